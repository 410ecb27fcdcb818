"""The launchers call what they should, as often as they should, and print exactly that when they only print."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launch import gke
from tests.launch.conftest import ROOT
from tests.launch.jobset import faults
from vqgan_jax.exit_codes import PREEMPTED, STORAGE
from vqgan_jax.train.checkpoints import SEAL_SECONDS

COMMAND = ("python", "train_vqgan.py", "--workdir=gs://b/a run", "--config.x=(1, 2)", "it's $HOME; `x`")
SHELLS = ("launch/local.sh", "launch/tpu_vm.sh", "launch/slurm.sbatch")
GKE = ("--name=job", "--image=registry/image:1", "--tpu=v5e-16")
TPU = ("--name=job", "--zone=us-x1-a", "--tpu=v5e-16", "--poll=0")
GONE = ("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource 'queuedResources/job'", 1)
DENIED = ("ERROR: (gcloud.compute.tpus.queued-resources.describe) You do not have an active account\n", 1)


def lines(result):
    """What a dry run prints, as the words that a shell makes of it."""
    script = "".join(f"printf '%s\\0' {line.removesuffix(' &')}; echo\n" for line in result.stdout.splitlines())
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return [line.split("\0") for line in found.stdout.removesuffix("\0\n").split("\0\n")]


def flags_of(call):
    return dict(word.removeprefix("--").partition("=")[::2] for word in call if word.startswith("--"))


# All of them


@pytest.mark.parametrize("script", SHELLS)
def test_shells_are_strict_and_clean(script):
    text = (ROOT / script).read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / script], check=True)


@pytest.mark.parametrize("script", SHELLS)
def test_shellcheck_finds_nothing(script):
    beside = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    shellcheck = beside or shutil.which("shellcheck")
    if shellcheck is None:
        missing = "shellcheck is not installed: pip install -r requirements-test.txt"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    found = subprocess.run([shellcheck, ROOT / script], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", [*SHELLS, "launch/gke.py"])
def test_help_and_mistakes(fakes, script):
    shown = fakes.run(script, "--help")
    assert shown.returncode == 0 and "--dry-run" in shown.stdout and "-- python train_vqgan.py" in shown.stdout
    given = {"launch/gke.py": GKE, "launch/tpu_vm.sh": TPU}.get(script, ())
    nothing = fakes.run(script, *given)
    assert nothing.returncode == 2 and nothing.stderr == "error: no command; write it behind --\n"
    odd = fakes.run(script, *given, "odd", "--", "true")
    assert odd.returncode == 2 and "odd" in odd.stderr and not fakes.calls


# Here


def test_local_runs_the_very_words(fakes):
    program = "import sys; print(sys.argv[1:])"
    result = fakes.run("launch/local.sh", "--", sys.executable, "-c", program, *COMMAND)
    assert result.returncode == 0 and result.stdout == f"{list(COMMAND)}\n"
    assert lines(fakes.run("launch/local.sh", "--dry-run", "--", *COMMAND)) == [list(COMMAND)]


def test_local_processes_know_each_other(fakes, tmp_path):
    names = ["VQGAN_JAX_DISTRIBUTED", "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"]
    names += ["JAX_NUM_CPU_DEVICES", "JAX_LOCAL_DEVICE_IDS"]
    program = "import json, os, sys; e = os.environ; i = e['JAX_PROCESS_ID']; "
    program += f"open({str(tmp_path)!r} + '/' + i, 'w').write(json.dumps([e[n] for n in {names}]))"
    flags = ("--processes=2", "--devices=4")
    assert fakes.run("launch/local.sh", *flags, "--", sys.executable, "-c", program).returncode == 0
    first, second = (json.loads((tmp_path / name).read_text()) for name in "01")
    assert first[0] == second[0] == "1" and first[1] == second[1] and first[1].startswith("127.0.0.1:")
    assert [first[2:], second[2:]] == [["2", "0", "4", "0,1,2,3"], ["2", "1", "4", "4,5,6,7"]]
    dry = fakes.run("launch/local.sh", *flags, "--port=21000", "--dry-run", "--", *COMMAND)
    printed = lines(dry)
    assert dry.stdout.count(" &\n") == 1 and printed[1][-len(COMMAND) :] == list(COMMAND)
    assert "JAX_PROCESS_ID=1" in printed[1] and "JAX_COORDINATOR_ADDRESS=127.0.0.1:21000" in printed[1]


@pytest.mark.parametrize(
    ("codes", "runs", "ends"),
    [([0], 1, 0), ([42, 42, 42, 0], 4, 0), ([3, 42, 3, 0], 3, 3), ([3, 0], 2, 0), ([2, 0], 1, 2), ([42, 2], 2, 2)],
    ids=str,
)
def test_local_restarts_what_should_be(fakes, tmp_path, codes, runs, ends):
    """Preempted: always; a crash: as often as allowed, here once; a user's error: never."""
    program = f"import pathlib, sys; p = pathlib.Path({str(tmp_path / 'n')!r}); "
    program += f"n = int(p.read_text()) if p.exists() else 0; p.write_text(str(n + 1)); sys.exit({codes}[n])"
    result = fakes.run("launch/local.sh", "--restarts=1", "--", sys.executable, "-c", program)
    assert result.returncode == ends and (tmp_path / "n").read_text() == str(runs)


def test_local_counts_crashes_anew_after_an_attempt_that_lasted(fakes, tmp_path):
    """One restart is allowed: the second crash ends the job only where the attempts were short."""
    program = f"import pathlib, sys, time; p = pathlib.Path({str(tmp_path / 'n')!r}); time.sleep(1.1); "
    program += "n = int(p.read_text()) if p.exists() else 0; p.write_text(str(n + 1)); sys.exit([3, 3, 0][n])"
    line = ("--restarts=1", "--", sys.executable, "-c", program)
    assert fakes.run("launch/local.sh", "--lasting=1", *line).returncode == 0
    (tmp_path / "n").unlink()
    assert fakes.run("launch/local.sh", *line).returncode == 3


def started(tmp_path, count):
    for _ in range(600):
        if len(list(tmp_path.glob("started*"))) == count:
            return
        time.sleep(0.05)
    raise AssertionError("not started")


def test_local_hands_sigterm_on_and_does_not_restart(tmp_path):
    program = "import os, signal, sys, time; i = os.environ['JAX_PROCESS_ID']; "
    program += f"signal.signal(15, lambda *_: (open({str(tmp_path)!r} + '/saved' + i, 'w'), sys.exit(42))); "
    program += f"open({str(tmp_path)!r} + '/started' + i, 'w'); time.sleep(60)"
    line = [ROOT / "launch/local.sh", "--processes=2", "--", sys.executable, "-c", program]
    launcher = subprocess.Popen(line)
    started(tmp_path, 2)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(30) == 42 and len(list(tmp_path.glob("saved*"))) == 2


def test_local_does_not_leave_the_others_behind(fakes, tmp_path):
    """One process dies, the other would wait for ever: it is killed once its grace is over."""
    program = "import os, signal, sys, time; i = os.environ['JAX_PROCESS_ID']; "
    program += f"i == '1' and os.kill(os.getpid(), 9); open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); "
    program += "time.sleep(60)"
    flags = ("--processes=2", "--grace=1", "--restarts=0")
    result = fakes.run("launch/local.sh", *flags, "--", sys.executable, "-c", program)
    assert result.returncode == 137 and "the others are killed" in result.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_local_ends_with_its_parent(tmp_path):
    program = f"import os, time; open({str(tmp_path)!r} + '/started', 'w').write(str(os.getpid())); time.sleep(60)"
    inner = shlex.join([str(ROOT / "launch/local.sh"), "--with-parent", "--", sys.executable, "-c", program])
    parent = subprocess.Popen(["bash", "-c", f"{inner} & wait"])
    started(tmp_path, 1)
    parent.kill()
    parent.wait()
    pid = int((tmp_path / "started").read_text() or 0)
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("it runs on")


# GKE


@pytest.mark.parametrize(
    ("tpu", "slices", "accelerator", "topology", "hosts", "chips"),
    [
        ("v4-32", 1, "tpu-v4-podslice", "2x2x4", 4, 4),
        ("v5e-16", 2, "tpu-v5-lite-podslice", "4x4", 4, 4),
        ("v5litepod-8", 1, "tpu-v5-lite-podslice", "2x4", 1, 8),
        ("v5p-64", 4, "tpu-v5p-slice", "2x4x4", 8, 4),
        ("v6e-1", 1, "tpu-v6e-slice", "1x1", 1, 1),
        ("v6e-256", 1, "tpu-v6e-slice", "16x16", 64, 4),
    ],
)
def test_manifests_are_jobsets(fakes, tpu, slices, accelerator, topology, hosts, chips):
    flags = ("--name=job", "--image=i", f"--tpu={tpu}", f"--slices={slices}", "--spot", "--env=A=b c", "--queue=q")
    result = fakes.run("launch/gke.py", *flags, "--service-account=sa", "--", *COMMAND)
    assert result.returncode == 0 and fakes.calls == [["kubectl", "--namespace", "default", "apply", "-f", "-"]]
    made = yaml.safe_load(fakes.applied)
    assert faults(made) == []
    (replicated,) = made["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert replicated["replicas"] == slices and job["parallelism"] == job["completions"] == hosts
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == accelerator
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology
    assert container["resources"]["limits"] == {"google.com/tpu": chips} and container["command"] == list(COMMAND)
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    several = {"VQGAN_JAX_DISTRIBUTED": "1"} if hosts * slices > 1 else {}
    assert variables == several | {gke.CACHE: "gs://b/compiled", "A": "b c"}


def test_preemption_restarts_the_jobset_and_a_crash_counts(fakes):
    fakes.run("launch/gke.py", *GKE, "--restarts=5", "--grace=45", "--", *COMMAND)
    spec = yaml.safe_load(fakes.applied)["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert job["template"]["spec"]["restartPolicy"] == "Never" and job["backoffLimit"] == 0
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] == 45
    exits, lost = job["podFailurePolicy"]["rules"]
    assert exits == {
        "action": "FailJob",
        "onExitCodes": {"containerName": "main", "operator": "In", "values": [PREEMPTED, STORAGE]},
    }
    assert lost["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    policy = spec["failurePolicy"]
    assert policy["maxRestarts"] == 5 and policy["rules"][0]["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_a_pod_may_wait_for_its_checkpoint_to_be_sealed(fakes):
    fakes.run("launch/gke.py", *GKE, "--", *COMMAND)
    job = yaml.safe_load(fakes.applied)["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] > SEAL_SECONDS


def test_the_schema_finds_typos():
    """The check itself: a field that is unknown, missing, or of another type."""
    good = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": {"name": "a"}}
    pod = {"containers": [{"name": "a", "image": "b"}]}
    jobs = [{"name": "a", "template": {"spec": {"template": {"spec": pod}}}}]
    assert faults(good | {"spec": {"replicatedJobs": jobs}}) == []
    for broken, said in (
        ({"replicatedJobs": jobs, "failurePolicy": {"maxRestart": 3}}, "maxRestart: is not known"),
        ({"replicatedJobs": jobs, "failurePolicy": {"maxRestarts": "3"}}, "'3' is not of"),
        ({"replicatedJobs": jobs, "failurePolicy": {"rules": [{"action": "FailJobSet"}]}}, "name: is missing"),
        ({}, "replicatedJobs: is missing"),
    ):
        (fault,) = faults(good | {"spec": broken})
        assert said in fault


def test_gke_prints_what_it_would_run(fakes):
    dry = fakes.run("launch/gke.py", *GKE, "--build", "--dry-run", "--", *COMMAND)
    assert dry.returncode == 0 and not fakes.calls
    head, _, rest = dry.stdout.partition(" <<'EOF'\n")
    fakes.run("launch/gke.py", *GKE, "--build", "--", *COMMAND)
    assert [shlex.split(line) for line in head.splitlines()] == fakes.calls
    assert rest == f"{fakes.applied}EOF\n"
    assert fakes.calls[0][:3] == ["docker", "build", "-f"] and fakes.calls[0][-1] == "."


def test_gke_builds_first_and_stops_where_that_fails(fakes):
    assert fakes.run("launch/gke.py", *GKE, "--build", "--", *COMMAND).returncode == 0
    assert [call[:2] for call in fakes.calls] == [["docker", "build"], ["docker", "push"], ["kubectl", "--namespace"]]
    fakes.answer("docker", "push", answers=[("", 1)])
    result = fakes.run("launch/gke.py", *GKE, "--build", "--", *COMMAND)
    assert result.returncode == 2 and result.stderr == "error: exit code 1 of: docker push registry/image:1\n"
    assert fakes.calls[-1][:2] == ["docker", "push"]


@pytest.mark.parametrize(("end", "code"), [("Completed", 0), ("Failed", 1)])
def test_gke_waits_for_the_end(fakes, end, code):
    """Through an answer that did not come; an earlier failed try of the name is deleted."""
    states = [("job Failed", 0), ("job ", 0), ("", 1), (f"job {end}", 0)]
    fakes.answer("kubectl", "get", answers=states)
    assert fakes.run("launch/gke.py", *GKE, "--wait", "--poll=0", "--", *COMMAND).returncode == code
    assert [call[3] for call in fakes.calls] == ["get", "delete", "apply", "get", "get", "get"]


@pytest.mark.parametrize("state", ["", "Failed", "Completed"])
def test_gke_leaves_another_commands_jobset_alone(fakes, state):
    """The annotation of a manifest tells: the same command is gone on with, another one is neither run nor deleted."""
    dry = fakes.run("launch/gke.py", *GKE, "--wait", "--dry-run", "--", *COMMAND).stdout
    (made,) = [part for part in dry.split("EOF\n") if part.startswith("apiVersion")] or [dry.split("<<'EOF'\n")[1]]
    annotation = yaml.safe_load(made.split("EOF\n")[0])["metadata"]["annotations"]["command"]
    assert shlex.split(annotation) == list(COMMAND)
    fakes.answer("kubectl", "get", answers=[(f"job {state} python other.py", 0)])
    result = fakes.run("launch/gke.py", *GKE, "--wait", "--poll=0", "--", *COMMAND)
    assert result.returncode == 2 and "for another command" in result.stderr and result.stderr.count("\n") == 1
    assert [call[3] for call in fakes.calls] == ["get"]
    query = next(word for word in fakes.calls[0] if word.startswith("--output"))
    assert query == "--output=jsonpath={.metadata.name} {.status.terminalState} {.metadata.annotations.command}"


def test_gke_attaches_to_the_same_command(fakes):
    fakes.answer("kubectl", "get", answers=[(f"job  {shlex.join(COMMAND)}", 0), ("job Completed", 0)])
    assert fakes.run("launch/gke.py", *GKE, "--wait", "--poll=0", "--", *COMMAND).returncode == 0
    assert [call[3] for call in fakes.calls] == ["get", "get"]


def test_names_of_pods_fit_their_labels():
    """At most 63 characters with what JobSet and Jobs add: JOBSET-slice-SLICE-POD-RANDOM."""
    args = gke.parse(["--name=" + "a" * 40, "--image=i", "--tpu=v5p-2048", "--slices=256", "--", "true"])
    (replicated,) = gke.manifest(args)["spec"]["replicatedJobs"]
    pods = replicated["template"]["spec"]["parallelism"]
    assert len(f"{args.name}-{replicated['name']}-{replicated['replicas'] - 1}-{pods - 1}-abcde") <= 63
    with pytest.raises(gke.LaunchError, match="at most 40"):
        gke.parse(["--name=" + "a" * 41, *GKE[1:], "--", "true"])
    with pytest.raises(gke.LaunchError, match="at most 63"):
        gke.parse([*GKE, "--queue=" + "q" * 64, "--", "true"])


@pytest.mark.parametrize(
    ("command", "cache"),
    [
        ("python x.py --workdir=gs://b/runs/x", "gs://b/runs/compiled"),
        ("python x.py --out gs://b/runs/x.json --workdir=gs://b/x", "gs://b/runs/compiled"),
        ("python x.py --workdir gs://b/x/", "gs://b/compiled"),
        ("python x.py --workdir=/mnt/runs/x", "/mnt/runs/compiled"),
        ("python x.py --workdir=runs/x --out", ""),
        ("python x.py", ""),
    ],
)
def test_pods_keep_what_they_compile(fakes, command, cache):
    """A pod's disk is empty after a restart; what is named by hand stands."""
    words = shlex.split(command)
    assert gke.environment(gke.parse([*GKE, "--", *words])).get(gke.CACHE, "") == cache
    by_hand = gke.parse([*GKE, f"--env={gke.CACHE}=/c", "--", *words])
    assert gke.environment(by_hand)[gke.CACHE] == "/c"
    start = fakes.run("launch/tpu_vm.sh", *TPU, "--dry-run", "--only=run", "--", *words).stdout
    assert (f"{gke.CACHE}={cache}" in start) == cache.startswith("gs://")
    start = fakes.run("launch/tpu_vm.sh", *TPU, f"--env={gke.CACHE}=/c", "--dry-run", "--only=run", "--", *words).stdout
    assert start.count(gke.CACHE) == 1


def test_gke_attaches_to_what_runs(fakes):
    fakes.answer("kubectl", "get", answers=[("job ", 0), ("job Completed", 0)])
    assert fakes.run("launch/gke.py", *GKE, "--wait", "--poll=0", "--", *COMMAND).returncode == 0
    assert [call[3] for call in fakes.calls] == ["get", "get"]


def test_xpk(fakes):
    result = fakes.run("launch/gke.py", *GKE, "--slices=2", "--xpk", "--cluster=c", "--zone=z", "--", *COMMAND)
    (call,) = fakes.calls
    assert result.returncode == 0 and call[:3] == ["xpk", "workload", "create"]
    flags = flags_of(call)
    assert flags["tpu-type"] == "v5litepod-16" and flags["num-slices"] == "2" and flags["docker-image"] == GKE[1][8:]
    assert int(flags["max-restarts"]) > 100 and (flags["cluster"], flags["zone"]) == ("c", "z")
    assert shlex.split(flags["command"]) == [
        "exec",
        "env",
        "VQGAN_JAX_DISTRIBUTED=1",
        f"{gke.CACHE}=gs://b/compiled",
        *COMMAND,
    ]


@pytest.mark.parametrize("flag", ["--restarts=3", "--wait", "--queue=q", "--service-account=a", "--namespace=n"])
def test_xpk_says_what_it_cannot(fakes, flag):
    result = fakes.run("launch/gke.py", *GKE, "--xpk", "--cluster=c", flag, "--", *COMMAND)
    assert result.returncode == 2 and result.stderr.startswith("error: --xpk: no") and not fakes.calls


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--name=Job", "--image=i", "--tpu=v5e-16"), "--name=Job: small letters"),
        (("--name=j", "--image=i", "--tpu=v5e-12"), "--tpu=v5e-12: N is one of 1, 4, 8, 16"),
        (("--name=j", "--image=i", "--tpu=v4-9"), "--tpu=v4-9: N is one of 8, 16"),
        (("--name=j", "--image=i", "--tpu=h100-8"), "--tpu=h100-8: no such TPU"),
        (("--name=j", "--tpu=v5e-16"), "--image is missing"),
        ((*GKE, "--env=A"), "--env=A: write NAME=VALUE"),
        ((*GKE, "--xpk"), "--xpk needs --cluster"),
    ],
)
def test_gke_says_mistakes_in_one_line(fakes, flags, said):
    result = fakes.run("launch/gke.py", *flags, "--", *COMMAND)
    assert result.returncode == 2 and said in result.stderr and result.stderr.count("\n") == 1 and not fakes.calls


def test_a_program_that_is_missing_is_named(fakes):
    result = fakes.run("launch/gke.py", *GKE, "--", *COMMAND, PATH="/nowhere")
    assert result.returncode == 2 and result.stderr == "error: kubectl is not installed\n"


# Queued resources


def actions(calls):
    """Calls of gcloud as their verbs; for ssh whether it starts, follows or asks for the exit code."""
    names = []
    for call in calls:
        verb = call[4]
        command = flags_of(call).get("command", "")
        if verb == "ssh":
            kinds = {"uv pip": "install", "nohup": "start", "tail -n": "follow", "launch.code": "code"}
            verb = next(kind for part, kind in kinds.items() if part in command)
        names.append(verb)
    return names


def answer_tpu(fakes, states, codes=(("0", 0),), **answers):
    fakes.answer("describe", answers=states)
    fakes.answer("ssh", "cat job/launch.code", answers=list(codes))


def test_tpu_vm_from_nothing_to_nothing(fakes):
    answer_tpu(fakes, [GONE, ("WAITING_FOR_RESOURCES", 0), ("ACTIVE", 0)])
    result = fakes.run("launch/tpu_vm.sh", *TPU, "--project=p", "--spot", "--env=A=b c", "--", *COMMAND)
    assert result.returncode == 0, result.stderr
    verbs = ["describe", "create", "describe", "describe", "scp", "install", "start", "follow", "code", "delete"]
    assert actions(fakes.calls) == verbs
    assert all({"--zone=us-x1-a", "--project=p"} <= set(call) for call in fakes.calls)
    created = fakes.calls[1]
    assert {"--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"} <= set(created)
    workers = {name: flags_of(call).get("worker") for name, call in zip(verbs, fakes.calls, strict=True)}
    assert (workers["scp"], workers["install"], workers["start"], workers["follow"]) == ("all", "all", "all", "0")


def test_tpu_vm_dry_run_is_what_runs(fakes):
    printed = lines(fakes.run("launch/tpu_vm.sh", *TPU, "--dry-run", "--", *COMMAND))
    assert not fakes.calls
    answer_tpu(fakes, [GONE, ("ACTIVE", 0)])
    assert fakes.run("launch/tpu_vm.sh", *TPU, "--", *COMMAND).returncode == 0
    asked = [call for call in fakes.calls if call[4] != "describe"]
    assert [line for line in printed if line[0] == "gcloud" and line[4] != "describe"] == asked


def test_tpu_vm_workers_run_the_very_words(fakes, tmp_path):
    """What the workers are told, done here by a shell: the source's place, the environment, the words, the code."""
    answer_tpu(fakes, [("ACTIVE", 0)])
    show = ("python", "-c", "import os, sys; print([os.environ['A'], *sys.argv[1:]]); sys.exit(7)", *COMMAND)
    fakes.run("launch/tpu_vm.sh", *TPU, "--env=A=b c", "--restarts=0", "--", *show)
    start = next(call for call in fakes.calls if "nohup" in call[-1])
    (tmp_path / "job" / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "job" / ".venv" / "bin" / "python").symlink_to(sys.executable)
    subprocess.run(["bash", "-c", flags_of(start)["command"]], cwd=tmp_path, check=True)
    code = tmp_path / "job" / "launch.code"
    for _ in range(400):
        if code.exists() and code.read_text():
            break
        time.sleep(0.05)
    assert code.read_text() == "7\n"
    assert (tmp_path / "job" / "launch.log").read_text() == f"{['b c', *COMMAND]}\n"


def test_tpu_vm_asks_again_for_what_was_taken_away(fakes):
    """The slice goes while the command runs: no exit code and no state ACTIVE. It is deleted and created anew."""
    states = [("ACTIVE", 0), ("SUSPENDED", 0), ("SUSPENDED", 0), GONE, ("ACTIVE", 0)]
    answer_tpu(fakes, states, codes=[("", 255), ("0", 0)])
    assert fakes.run("launch/tpu_vm.sh", *TPU, "--spot", "--restarts=0", "--", *COMMAND).returncode == 0
    run = ["scp", "install", "start", "follow", "code"]
    again = ["describe", "describe", "delete", "describe", "create", "describe"]
    assert actions(fakes.calls) == ["describe", *run, *again, *run, "delete"]


def test_tpu_vm_does_not_take_silence_for_an_end(fakes):
    """gcloud fails for another reason than that there is no such slice: at first that is a mistake, later it passes."""
    answer_tpu(fakes, [DENIED])
    result = fakes.run("launch/tpu_vm.sh", *TPU, "--", *COMMAND)
    assert result.returncode == 2 and "active account" in result.stderr and "gcloud does not answer" in result.stderr
    assert actions(fakes.calls) == ["describe"]


def test_tpu_vm_waits_until_gcloud_answers_again(fakes):
    """The connection is lost while the command runs, then gcloud's answers are: nothing is created or run twice."""
    answer_tpu(fakes, [("ACTIVE", 0), DENIED, DENIED, ("ACTIVE", 0)], codes=[("", 255), ("0", 0)])
    result = fakes.run("launch/tpu_vm.sh", *TPU, "--", *COMMAND)
    assert result.returncode == 0 and result.stderr.count("active account") == 1
    names = actions(fakes.calls)
    assert "create" not in names and names.count("start") == 1 and names.count("delete") == 1


def test_tpu_vm_does_not_follow_another_command(fakes, tmp_path):
    """What the workers are told where something runs already: the same is gone on with, another thing is an error."""
    fakes.run("launch/tpu_vm.sh", *TPU, "--dry-run", "--", "true")

    def told(*words):
        printed = lines(fakes.run("launch/tpu_vm.sh", *TPU, "--dry-run", "--only=run", "--", *words))
        return next(flags_of(line)["command"] for line in printed if "nohup" in line[-1])

    (tmp_path / "job").mkdir()
    for words, code in ((("sleep", "60"), 0), (("sleep", "60"), 0), (("sleep", "61"), 1)):
        found = subprocess.run(["bash", "-c", told(*words)], cwd=tmp_path, capture_output=True, text=True)
        assert found.returncode == code, found.stderr
        pid = int((tmp_path / "job" / "launch.pid").read_text())
    assert "another command runs here" in found.stderr
    os.killpg(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("codes", "runs", "ends"), [("42 42 0", 3, 0), ("1 1 0", 2, 1), ("1 0", 2, 0), ("2 0", 1, 2)], ids=str
)
def test_tpu_vm_restarts_what_should_be(fakes, codes, runs, ends):
    answer_tpu(fakes, [("ACTIVE", 0)], codes=[(code, 0) for code in codes.split()])
    result = fakes.run("launch/tpu_vm.sh", *TPU, "--restarts=1", "--", *COMMAND)
    names = actions(fakes.calls)
    assert result.returncode == ends and names.count("start") == runs
    assert names[-1] == "delete" and "create" not in names


def test_tpu_vm_counts_crashes_anew_after_an_attempt_that_lasted(fakes):
    answer_tpu(fakes, [("ACTIVE", 0)], codes=[(code, 0) for code in "1110"])
    assert fakes.run("launch/tpu_vm.sh", *TPU, "--restarts=1", "--lasting=0", "--", *COMMAND).returncode == 0


def test_tpu_vm_stays_after_a_failed_installation(fakes):
    answer_tpu(fakes, [("ACTIVE", 0)])
    fakes.answer("scp", answers=[("", 1)])
    result = fakes.run("launch/tpu_vm.sh", *TPU, "--", *COMMAND)
    assert result.returncode == 2 and "could not install" in result.stderr and "start" not in actions(fakes.calls)
    assert "delete" not in actions(fakes.calls)


def test_tpu_vm_single_actions(fakes):
    where = ("--name=job", "--zone=us-x1-a")
    assert fakes.run("launch/tpu_vm.sh", *where, "--only=delete").returncode == 0
    assert actions(fakes.calls) == ["delete"] and {"--force", "--quiet"} <= set(fakes.calls[0])
    for flags, said in (
        (("--only=paint",), "--only=paint"),
        ((), "no command"),
        (("--tpu=v7-8", "--", "true"), "--tpu=v7-8"),
        (("--", "true"), "--tpu is missing"),
    ):
        result = fakes.run("launch/tpu_vm.sh", *where, *flags)
        assert result.returncode == 2 and said in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.slow
def test_gcloud_knows_the_flags(fakes, tmp_path):
    """The commands against the real gcloud's own description of itself, where there is one; it needs no login."""
    gcloud = shutil.which("gcloud")
    if gcloud is None:
        pytest.skip("needs gcloud")
    printed = lines(fakes.run("launch/tpu_vm.sh", *TPU, "--project=p", "--spot", "--dry-run", "--", "true"))
    for line in (line for line in printed if line[0] == "gcloud"):
        lint = [gcloud, "meta", "lint-gcloud-commands", f"--command-string={shlex.join(line)}"]
        environment = os.environ | {"CLOUDSDK_CONFIG": str(tmp_path)}
        found = subprocess.run(lint, capture_output=True, text=True, env=environment, timeout=120)
        assert found.returncode == 0, found.stdout + found.stderr
        (told,) = json.loads(found.stdout)
        assert told["success"], told


# Slurm


def test_slurm_submits_itself(fakes):
    fakes.answer("sbatch", answers=[("123\n", 0)])
    flags = ("--nodes=2", "--ntasks-per-node=8", "--name=job", "--restarts=7")
    result = fakes.run("launch/slurm.sbatch", *flags, "--", *COMMAND)
    (call,) = fakes.calls
    assert result.stdout == "123\n"
    assert call[:5] == ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=8", "--job-name=job"]
    assert call[5] == "--export=ALL,LAUNCH_RESTARTS=7,LAUNCH_LASTING=3600" and call[7:] == list(COMMAND)
    assert call[6].endswith("launch/slurm.sbatch")
    printed = lines(fakes.run("launch/slurm.sbatch", *flags, "--dry-run", "--", *COMMAND))
    assert printed == [call] and len(fakes.calls) == 1


def in_job(tmp_path, **variables):
    return dict(SLURM_JOB_ID="9", SLURM_NTASKS="2", SLURM_SUBMIT_DIR=str(tmp_path), **variables)


@pytest.mark.parametrize(
    ("codes", "requeued"),
    [([0], []), ([42, 42, 42, 42, 0], [True] * 4), ([1, 42, 137, 42, 1], [True] * 4), ([1, 1, 2], [True, True])],
    ids=str,
)
def test_slurm_requeues_what_should_be(fakes, tmp_path, codes, requeued):
    """Preemptions are no crashes, though Slurm's own count of restarts holds both; here two crashes are allowed."""
    fakes.answer("srun", answers=[("", code) for code in codes])
    for count, (code, again) in enumerate(zip(codes, [*requeued, False], strict=True)):
        job = in_job(tmp_path, LAUNCH_RESTARTS="2", SLURM_RESTART_COUNT=str(count))
        before = len(fakes.calls)
        assert fakes.run("launch/slurm.sbatch", *COMMAND, **job).returncode == code
        calls = fakes.calls[before:]
        assert calls[0][0] == "srun" and calls[0][-len(COMMAND) :] == list(COMMAND)
        assert (["scontrol", "requeue", "9"] in calls) == again
    assert not list(tmp_path.glob(".launch*"))  # the count went with the job


def test_slurm_counts_crashes_anew_after_an_attempt_that_lasted(fakes, tmp_path):
    """Also after one that was preempted in the end."""
    attempts = ((1, "0", True), (1, "0", True), (42, "0", True), (1, "3600", True), (1, "3600", False))
    fakes.answer("srun", answers=[("", code) for code, _, _ in attempts])
    for _, lasting, again in attempts:
        job = in_job(tmp_path, LAUNCH_RESTARTS="1", LAUNCH_LASTING=lasting)
        before = len(fakes.calls)
        fakes.run("launch/slurm.sbatch", *COMMAND, **job)
        assert (["scontrol", "requeue", "9"] in fakes.calls[before:]) == again


def test_slurm_does_not_requeue_what_was_cancelled(fakes, tmp_path):
    fakes.answer("srun", answers=[("", 42)])
    rest = '  "comment": "",\n' * 5000  # a reader that leaves at the word it looks for breaks the pipe
    fakes.answer("scontrol", "show", answers=[(f'{{"job_state": ["CANCELLED", "COMPLETING"],\n{rest}}}', 0)])
    result = fakes.run("launch/slurm.sbatch", *COMMAND, **in_job(tmp_path))
    assert result.returncode == 42 and "cancelled" in result.stderr
    assert not any("requeue" in call for call in fakes.calls)


def test_slurm_names_its_own_task_of_an_array(fakes, tmp_path):
    """The number of one task's job is the whole array's too: what is said of it would be said of all tasks."""
    fakes.answer("srun", answers=[("", 42)])
    fakes.run("launch/slurm.sbatch", *COMMAND, **in_job(tmp_path, SLURM_ARRAY_JOB_ID="9", SLURM_ARRAY_TASK_ID="3"))
    assert [call[-1] for call in fakes.calls if call[0] == "scontrol"] == ["9_3", "9_3"]


def test_slurm_hands_sigterm_on(fakes, tmp_path):
    """As srun does, the fake one kills its task on SIGTERM; scancel is what signals the task, which saves."""
    program = "import os, signal, sys, time; signal.signal(15, lambda *_: sys.exit(42)); "
    program += f"open({str(tmp_path / 'task')!r}, 'w').write(str(os.getpid())); "
    program += f"open({str(tmp_path / 'started')!r}, 'w'); time.sleep(60)"
    task = shlex.join([sys.executable, "-c", program])
    srun = f"trap 'kill -9 $task' TERM; {task} & task=$!; wait $task; code=$?; wait $task || code=$?; exit $code"
    (fakes.folder / "bin" / "srun").write_text(f"#!/bin/bash\n{srun}\n")
    scancel = f'[ "$*" = "--signal=TERM 9" ] && kill -TERM $(cat {tmp_path / "task"})'
    (fakes.folder / "bin" / "scancel").write_text(f"#!/bin/bash\n{scancel}\n")
    environment = fakes.environment | in_job(tmp_path)
    job = subprocess.Popen([ROOT / "launch/slurm.sbatch", "true"], env=environment, stderr=subprocess.DEVNULL)
    started(tmp_path, 1)
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == 42 and ["scontrol", "requeue", "9"] in fakes.calls


def test_slurm_tells_the_shell_before_a_time_limit():
    """So a limit ends as a preemption does: the shell is told while there is time to save, the tasks through it."""
    assert "\n#SBATCH --signal=B:TERM@180\n" in (ROOT / "launch/slurm.sbatch").read_text()
    assert "\n#SBATCH --requeue\n" in (ROOT / "launch/slurm.sbatch").read_text()


@pytest.mark.parametrize(("codes", "runs", "ends"), [([42, 42, 0], 3, 0), ([1, 42, 1], 3, 1), ([2], 1, 2)], ids=str)
def test_slurm_in_an_allocation_runs_there(fakes, tmp_path, codes, runs, ends):
    """Within salloc the same line as outside runs a step, starts again there, and requeues and submits nothing."""
    fakes.answer("srun", answers=[("", code) for code in codes])
    flags = ("--nodes=2", "--restarts=1", "--name=job")
    result = fakes.run("launch/slurm.sbatch", *flags, "--", *COMMAND, **in_job(tmp_path))
    assert result.returncode == ends and [call[0] for call in fakes.calls] == ["srun"] * runs
    assert {"--nodes=2", "--job-name=job"} <= set(fakes.calls[0]) and fakes.calls[0][-len(COMMAND) :] == list(COMMAND)
    printed = lines(fakes.run("launch/slurm.sbatch", *flags, "--dry-run", "--", *COMMAND, **in_job(tmp_path)))
    assert printed == [fakes.calls[0]] and not list(tmp_path.glob(".launch*"))


# What is installed


def pins(name):
    text = (ROOT / name).read_text()
    return dict(
        line.lower().replace("_", "-").split("==") for line in text.splitlines() if "==" in line and line[0] != "#"
    )


def test_the_lock_file_holds_what_is_asked_for():
    """Every requirement of pods is pinned: `pip install -r` takes nothing that was not tested."""
    locked = pins("requirements.lock")
    asked = [
        line.split("#")[0]
        for name in ("requirements.txt", "requirements-fast.txt", "requirements-gcs.txt")
        for line in (ROOT / name).read_text().splitlines()
    ]
    for line in filter(str.strip, asked):
        name = "".join(letter for letter in line.partition(">")[0].partition("[")[0] if letter != " ")
        assert name.lower().replace("_", "-") in locked, name
    assert pins("requirements-tpu.lock").keys() == {"libtpu"}
    assert "-r requirements.lock" in (ROOT / "requirements-tpu.lock").read_text()


def test_the_image_installs_the_lock_file_and_leaves_the_rest_out():
    text = (ROOT / "launch/Dockerfile").read_text()
    assert "requirements-tpu.lock" in text and 'pip install --no-cache-dir -r "$LOCK"' in text
    ignored = (ROOT / "launch/Dockerfile.dockerignore").read_text().splitlines()
    assert {".*", "runs", "tests"} <= set(ignored)


# For real


@pytest.mark.slow
def test_two_processes_train_through_the_launcher(tmp_path):
    """The same command as for one forms one job of two. (That it survives kills is in tests/train/test_drills.py.)"""
    command = [
        *(sys.executable, "train_vqgan.py", "--config=configs/demo_vqgan.py:runlocal", f"--workdir={tmp_path / 'run'}"),
        *("--config.images_shown=0", "--config.model.autoencoder.channels=32"),
    ]
    line = [ROOT / "launch/local.sh", "--processes=2", "--devices=1", "--", *command]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "VQGAN_JAX_CACHE": str(tmp_path / "cache")}
    result = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    record = json.loads((tmp_path / "run" / "run" / "0.json").read_text())
    assert record["devices"]["processes"] == 2 and record["devices"]["count"] == 2
    assert (tmp_path / "run" / "checkpoints" / "2" / "manifest.json").exists()
    steps = [json.loads(text)["step"] for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and set(steps) == {1, 2}
