#!/usr/bin/env python3
"""Runs any command on TPU slices of a GKE cluster, as a JobSet given to kubectl, or through xpk.

    launch/gke.py --name=vqgan --image=IMAGE --tpu=v5e-16 --slices=2 -- python train_vqgan.py --workdir=gs://B/x ...

kubectl must point at the cluster (gcloud container clusters get-credentials), which needs the JobSet operator. Exit
codes 42 (preempted, saved) and 200 (a storage that does not answer) and lost nodes restart all slices, however often;
crashes, and hosts that left because others were gone (134), --restarts times in the JobSet's life, which has no other
count: 134 is also what the others end with where one has a mistake of the user. What is compiled is kept beside the
command's --workdir or --out, for restarts to find; --env=JAX_COMPILATION_CACHE_DIR=... names another place. No more is
imported than PyYAML, so that it runs where JAX does not.

Through xpk the rules are xpk's own: exit code 42, what was killed (127 and above) and lost nodes restart all slices, at
most 1000 times together, for xpk does not count preemptions apart; any other exit code, that of a crash (1) too, ends
the workload. There is no --restarts, --wait, --queue, --service-account or --namespace.
"""

import argparse
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parent.parent
USER_ERROR, CRASHED = 2, 1  # exit codes, as of the training scripts; and those that are not the command's fault:
FREE = (42, 200)
GRACE = 330  # seconds: the 300 that hosts may wait for host 0 to seal the last checkpoint, and a step
CONTAINER = "main"
COMMAND = "command"  # the annotation that tells jobs of one name apart
CACHE = "JAX_COMPILATION_CACHE_DIR"
XPK_RESTARTS = 1000
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}  # chips
_CUBES = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
    1024: "8x8x16", 2048: "8x16x16",
}  # fmt: skip


class Generation(NamedTuple):
    """GKE's name of a TPU, its topologies by chips, what a unit of its types counts, and xpk's name for it."""

    accelerator: str
    topologies: dict[int, str]
    units_a_chip: int
    xpk: str


GENERATIONS = {
    "v4": Generation("tpu-v4-podslice", _CUBES, 2, "v4"),
    "v5e": Generation("tpu-v5-lite-podslice", _FLAT, 1, "v5litepod"),
    "v5p": Generation("tpu-v5p-slice", _CUBES, 2, "v5p"),
    "v6e": Generation("tpu-v6e-slice", _FLAT, 1, "v6e"),
}


class LaunchError(Exception):
    """A mistake of the command line, in one line."""


class Slice(NamedTuple):
    """What a pod asks for, and how many there are a slice."""

    accelerator: str
    topology: str
    hosts: int
    chips_a_host: int
    xpk_type: str


def slice_of(tpu: str) -> Slice:
    """The slice that a type such as "v5e-16" names; v4 and v5p count two cores a chip. Raises LaunchError."""
    generation, _, size = tpu.replace("v5litepod", "v5e").partition("-")
    if generation not in GENERATIONS:
        raise LaunchError(f"--tpu={tpu}: no such TPU; there are {', '.join(f'{name}-N' for name in GENERATIONS)}")
    accelerator, topologies, units, xpk = GENERATIONS[generation]
    chips = int(size) // units if size.isdecimal() and int(size) % units == 0 else 0
    if chips not in topologies:
        raise LaunchError(f"--tpu={tpu}: N is one of {', '.join(str(chips * units) for chips in topologies)}")
    chips_a_host = min(chips, 4) if chips != 8 or units == 2 else 8  # eight flat chips share one host
    return Slice(accelerator, topologies[chips], chips // chips_a_host, chips_a_host, f"{xpk}-{size}")


def environment(args: argparse.Namespace) -> dict[str, str]:
    """The variables of the command: several hosts form one job, and a pod's own disk is lost when it restarts."""
    several = slice_of(args.tpu).hosts * args.slices > 1
    cache = cache_of(args.command)
    return ({"VQGAN_JAX_DISTRIBUTED": "1"} if several else {}) | ({CACHE: cache} if cache else {}) | args.env


def cache_of(command: Sequence[str]) -> str:
    """Where a command's compiled programs are kept: beside what it writes; "" where it does not say what that is."""
    for word, after in zip(command, [*command[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        place = (value if equals else after).rstrip("/")
        if name in ("--workdir", "--out") and re.fullmatch(r"(gs://[^/]+)?/.+", place):
            return f"{place.rpartition('/')[0]}/compiled"
    return ""


def manifest(args: argparse.Namespace) -> dict[str, Any]:
    """The JobSet (jobset.x-k8s.io/v1alpha2): one job a slice, one pod a host, all of them restarted together."""
    slice_ = slice_of(args.tpu)
    selector = {
        "cloud.google.com/gke-tpu-accelerator": slice_.accelerator,
        "cloud.google.com/gke-tpu-topology": slice_.topology,
    }
    tolerations = [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}]
    if args.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        tolerations.append({"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true"})
    container = {
        "name": CONTAINER,
        "image": args.image,
        "command": list(args.command),
        "env": [{"name": name, "value": value} for name, value in environment(args).items()],
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],  # of libtpu: within a slice, between slices
        "resources": {"limits": {"google.com/tpu": slice_.chips_a_host}},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],  # data workers pass batches through it
    }
    pod = {
        "restartPolicy": "Never",
        "nodeSelector": selector,
        "tolerations": tolerations,
        "terminationGracePeriodSeconds": args.grace,
        "containers": [container],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }
    if args.service_account:
        pod["serviceAccountName"] = args.service_account
    job = {
        "parallelism": slice_.hosts,
        "completions": slice_.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # a pod alone is never restarted: the others would wait for a process that has forgotten all
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": list(FREE)},
                },
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"spec": pod},
    }
    metadata = {"name": args.name, "namespace": args.namespace}
    metadata["annotations"] = {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool",
        COMMAND: shlex.join(args.command),
    }
    if args.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": args.queue}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            # The two rules above are the only ones that end a job with the reason PodFailurePolicy.
            "failurePolicy": {
                "maxRestarts": args.restarts,
                "rules": [
                    {
                        "name": "preempted",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [{"name": "slice", "replicas": args.slices, "template": {"spec": job}}],
        },
    }


def xpk_command(args: argparse.Namespace) -> list[str]:
    """`xpk workload create` for the same job, as far as xpk can: this file's docstring says what it cannot."""
    where = {"cluster": args.cluster, "project": args.project, "zone": args.zone}
    # xpk hands SIGTERM to the subshell that it puts the command into: exec makes that the command itself.
    command = ["exec", "env", *(f"{name}={value}" for name, value in environment(args).items()), *args.command]
    return [
        *("xpk", "workload", "create", f"--workload={args.name}"),
        *(f"--{name}={value}" for name, value in where.items() if value),
        *(f"--tpu-type={slice_of(args.tpu).xpk_type}", f"--num-slices={args.slices}"),
        *(f"--docker-image={args.image}", f"--command={shlex.join(command)}"),
        *(f"--max-restarts={XPK_RESTARTS}", f"--termination-grace-period-seconds={args.grace}"),
        *(["--spot"] if args.spot else []),
    ]


class Shell:
    """Runs commands, or prints them where it is dry."""

    def __init__(self, dry: bool):
        self.dry = dry

    def run(self, *command: str, text: str = "") -> None:
        """Runs a command with `text` as its standard input. Raises LaunchError where it fails."""
        if self.dry:
            here = f" <<'EOF'\n{text}EOF" if text else ""
            print(shlex.join(command) + here, flush=True)
            return
        code = subprocess.run(command, input=text or None, text=True, cwd=ROOT).returncode
        if code:
            raise LaunchError(f"exit code {code} of: {shlex.join(command)}")

    def read(self, *command: str) -> str | None:
        """What a command prints, "" where it is itself only printed, None where it fails."""
        if self.dry:
            print(shlex.join(command), flush=True)
            return ""
        found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        return None if found.returncode else found.stdout.strip()


def launch(args: argparse.Namespace, shell: Shell) -> int:
    """Builds where asked, submits, waits where asked. Returns the exit code. Raises LaunchError."""
    kubectl = ("kubectl", "--namespace", args.namespace)
    name = ("jobset", args.name)
    if args.delete:
        shell.run(*kubectl, "delete", *name)
        return 0
    if args.build:
        revision = Shell(dry=False).read("git", "rev-parse", "HEAD")
        arguments = ("--build-arg", f"REVISION={revision}") if revision else ()
        shell.run("docker", "build", "-f", "launch/Dockerfile", "-t", args.image, *arguments, ".")
        shell.run("docker", "push", args.image)
    if args.xpk:
        shell.run(*xpk_command(args))
    else:
        state, command = state_of(shell, kubectl, name) if args.wait else ("", "")
        if command and command != shlex.join(args.command):
            raise LaunchError(f"--name={args.name}: there is a JobSet of this name for another command; name another")
        if state == "Failed":  # what stands there under this name is of an earlier try
            shell.run(*kubectl, "delete", *name)
        if state not in ("Running", "Completed"):
            text = yaml.safe_dump(manifest(args), sort_keys=False, width=10**6)
            shell.run(*kubectl, "apply", "-f", "-", text=text)
    selector = f"jobset.sigs.k8s.io/jobset-name={args.name},batch.kubernetes.io/job-completion-index=0"
    print(f"its log: {shlex.join([*kubectl, 'logs', '--follow', f'--selector={selector}'])}", file=sys.stderr)
    if not args.wait:
        return 0
    while (state := state_of(shell, kubectl, name)[0]) not in ("Completed", "Failed"):
        if shell.dry:
            return 0
        if not state:
            raise LaunchError(f"{args.name}: the JobSet has gone")
        time.sleep(args.poll)
    return 0 if state == "Completed" else CRASHED


def state_of(shell: Shell, kubectl: Sequence[str], name: Sequence[str]) -> tuple[str, str]:
    """Of a JobSet Completed, Failed, Running, Unknown (kubectl does not answer), or "" where there is none; and the
    command that it is for, "" where that is not known."""
    fields = ("metadata.name", "status.terminalState", f"metadata.annotations.{COMMAND}")
    output = f"--output=jsonpath={' '.join(f'{{.{field}}}' for field in fields)}"
    found = shell.read(*kubectl, "get", *name, "--ignore-not-found", output)
    if found is None:
        return "Unknown", ""
    named, _, rest = found.partition(" ")
    terminal, _, command = rest.partition(" ")
    return terminal or ("Running" if named else ""), command


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; `command` is what stands behind --."""
    flags, command = list(argv), []
    if "--" in flags:
        flags, command = flags[: flags.index("--")], flags[flags.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        prog="launch/gke.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--name", required=True, help="what to call the JobSet")
    parser.add_argument("--image", default="", help="of the container, as launch/Dockerfile makes it")
    parser.add_argument("--tpu", default="", help="v4-32, v5e-16, v5p-64, v6e-16, ...")
    parser.add_argument("--slices", type=int, default=1, help="more than one: Multislice")
    parser.add_argument("--spot", action="store_true", help="on spot nodes")
    parser.add_argument(
        "--restarts", type=int, help="of crashes and lost hosts (10); exit codes 42 and 200 do not count; not of --xpk"
    )
    parser.add_argument("--grace", type=int, default=GRACE, help="seconds between SIGTERM and SIGKILL")
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="environment; any number of them"
    )
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--service-account", default="", help="of Kubernetes, with access to the bucket")
    parser.add_argument("--queue", default="", help="local queue of Kueue")
    parser.add_argument("--build", action="store_true", help="docker build and docker push of --image first")
    parser.add_argument("--wait", action="store_true", help="until it has ended; exit code 0 or 1")
    parser.add_argument("--poll", type=float, default=30.0, help="seconds between two looks of --wait")
    parser.add_argument("--delete", action="store_true", help="delete the JobSet, and nothing else")
    parser.add_argument("--xpk", action="store_true", help="through xpk, on --cluster")
    parser.add_argument("--cluster", default="", help="of xpk")
    parser.add_argument("--project", default="", help="of xpk, as gcloud's configuration has it")
    parser.add_argument("--zone", default="", help="of xpk, as gcloud's configuration has it")
    parser.add_argument("--dry-run", action="store_true", help="print what would run")
    args = parser.parse_args(flags)
    args.command = command
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", args.name):
        raise LaunchError(f"--name={args.name}: small letters, digits and hyphens, at most 40, a letter first")
    for pair in args.env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*=.*", pair, re.DOTALL):
            raise LaunchError(f"--env={pair}: write NAME=VALUE")
    args.env = dict(pair.split("=", 1) for pair in args.env)
    if not re.fullmatch(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?", args.queue):
        raise LaunchError(f"--queue={args.queue}: is a label: at most 63 letters, digits, hyphens, dots or underscores")
    not_of_xpk = [args.wait, args.queue, args.service_account, args.namespace != "default", args.restarts is not None]
    if args.delete:
        return args
    for given, complaint in (
        (args.image, "--image is missing: docker's name of what launch/Dockerfile makes"),
        (args.tpu, "--tpu is missing: such as v5e-16"),
        (command, "no command; write it behind --"),
        (args.cluster or not args.xpk, "--xpk needs --cluster"),
        (not (args.xpk and any(not_of_xpk)), "--xpk: no --restarts, --wait, --queue, --service-account or --namespace"),
        (args.slices >= 1 and (args.restarts or 0) >= 0, "--slices counts from 1, --restarts from 0"),
    ):
        if not given:
            raise LaunchError(complaint)
    slice_of(args.tpu)
    args.restarts = 10 if args.restarts is None else args.restarts
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        return launch(args, Shell(args.dry_run))
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except FileNotFoundError as error:
        print(f"error: {error.filename} is not installed", file=sys.stderr)
        return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
