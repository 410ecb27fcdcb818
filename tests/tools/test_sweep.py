"""Running a sweep: order, sharing, what failed and what was stopped, resuming, and one table with its page."""

import csv
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from tests.launch.conftest import Fakes, fakes  # noqa: F401
from vqgan_jax.config import UserError
from vqgan_jax.exit_codes import PREEMPTED
from vqgan_jax.tools import platforms, sweep, sweep_folder
from vqgan_jax.tools.trials import Plan, Stage, Trial


def stage(name, root, needs=(), script="-c", text="pass"):
    return Stage(name, f"digest of {name}", name, (script, text), tuple(needs), f"{root}/{name}")


@pytest.fixture
def plan(tmp_path):
    """Two tokenizers, a transformer and scores on each, one trial a tokenizer."""
    root, stages, trials = tmp_path / "sweep", [], []
    for q in ("64", "256"):
        stages += [stage(f"vqgan-{q}", root), stage(f"gpt-{q}", root, [f"vqgan-{q}"])]
        stages.append(stage(f"scores-{q}", root, [f"gpt-{q}"]))
        trials.append(Trial(f"codebook_size={q}", {"q": q}, (f"vqgan-{q}", f"gpt-{q}", f"scores-{q}")))
    return Plan(tuple(trials), {stage.name: stage for stage in stages})


@pytest.fixture
def folder(tmp_path, plan):
    folder = sweep.Folder(str(tmp_path / "sweep"))
    folder.write_plan(plan)
    return folder


class Runner:
    """Commands that end after some looks, with the code that they are told to."""

    def __init__(self, codes=None, looks=2):
        self.codes, self.looks, self.started, self.running, self.most = codes or {}, looks, [], 0, 0
        self.signals = []

    def __call__(self, stage):
        self.started.append(stage.name)
        self.running += 1
        self.most = max(self.most, self.running)
        return Command(self, self.codes.get(stage.name, 0))


class Command:
    def __init__(self, runner, code):
        self.runner, self.code, self.left, self.pid = runner, code, runner.looks, os.getpid()

    def poll(self):
        self.left -= 1
        if self.left > 0:
            return None
        self.runner.running -= 1
        return self.code

    def send_signal(self, number):
        self.runner.signals.append(number)
        self.code, self.left = PREEMPTED, 1


@pytest.mark.parametrize("jobs", [1, 2, 9])
def test_stages_run_in_order_and_side_by_side(plan, folder, jobs):
    runner = Runner()
    assert sweep.run_stages(plan, folder, runner, jobs=jobs, pause=0) == {}
    assert sorted(runner.started) == sorted(plan.stages) and runner.most == min(jobs, 2)
    for name in runner.started:
        needs = plan.stages[name].needs
        assert all(runner.started.index(need) < runner.started.index(name) for need in needs)
    assert folder.done(plan) == set(plan.stages)
    record = json.loads((folder.path / "done" / "gpt-64.json").read_text())
    assert record["command"] == "python -c pass" and record["seconds"] >= 0


def test_a_failure_holds_up_only_what_needs_it(plan, folder):
    runner = Runner({"gpt-64": 3})
    failed = sweep.run_stages(plan, folder, runner, jobs=1, pause=0)
    assert failed == {"gpt-64": "exit code 3", "scores-64": "needs gpt-64"}
    assert folder.done(plan) == {"vqgan-64", "vqgan-256", "gpt-256", "scores-256"}
    again = Runner()
    assert sweep.run_stages(plan, folder, again, jobs=1, pause=0) == {}
    assert again.started == ["gpt-64", "scores-64"]


def test_told_to_stop_it_lets_what_runs_save(plan, folder):
    runner = Runner(looks=5)
    failed = sweep.run_stages(plan, folder, runner, jobs=2, told_to_stop=lambda: len(runner.started) > 1, pause=0)
    assert runner.signals == [signal.SIGTERM] * 2 and set(failed) == set(plan.stages) and folder.done(plan) == set()
    assert {name for name, reason in failed.items() if reason == "stopped"} == set(runner.started)
    assert set(failed.values()) == {"stopped", "not begun"}


def held_by(folder, stage, runner, command=None):
    """A claim as a runner on this machine leaves it; "1" is when no process started."""
    made = sweep_folder.Holder.here(command)
    start = sweep_folder._start_of(runner) or "1"
    assert folder._write_claim(stage, 1, dataclasses.replace(made, runner=(runner, start)))


@pytest.mark.parametrize("allocation", ["", "9"])
def test_what_another_runner_has_is_left_to_it(plan, folder, allocation, monkeypatch):
    """Two terminals in one allocation of Slurm too are two runners."""
    monkeypatch.setenv("SLURM_JOB_ID", allocation)
    held_by(folder, plan.stages["vqgan-64"], os.getppid())
    runner = Runner()
    failed = sweep.run_stages(plan, folder, runner, jobs=1, pause=0)
    assert set(failed) == {"vqgan-64", "gpt-64", "scores-64"} and "vqgan-64" not in runner.started
    claims = folder.claims(plan.stages["vqgan-64"])
    assert f"is run by process {os.getppid()} on" in failed["vqgan-64"] and f"delete {claims}" in failed["vqgan-64"]
    assert not list(folder.claims(plan.stages["vqgan-256"]).iterdir())  # what was run is given up


@pytest.mark.parametrize("allocation", ["", "9"])
def test_what_a_dead_runner_has_started_ends_first(plan, folder, allocation, monkeypatch, capsys):
    """Its training saves at this moment: a second one in its workdir would get in its way."""
    monkeypatch.setattr(sweep_folder, "_slurm_knows", lambda job: True)  # the allocation lives on
    monkeypatch.setenv("SLURM_JOB_ID", allocation)
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = subprocess.Popen(["sleep", "0.5"])
    held_by(folder, plan.stages["vqgan-64"], dead.pid, left.pid)
    runner, ended = Runner(), []

    def start(stage):
        ended.append((stage.name, left.poll() is not None or sweep_folder._start_of(left.pid) == ""))
        return runner(stage)

    assert sweep.run_stages(plan, folder, start, jobs=1, pause=0.01) == {}
    left.wait()
    assert dict(ended)["vqgan-64"] and not dict(ended)["vqgan-256"]
    assert capsys.readouterr().out.count(f"waits for process {left.pid}") == 1


def test_what_ended_well_meanwhile_is_not_run(plan, folder):
    """Another runner gives a stage up between the look at what is done and the claim."""
    claim, stage = folder.claim, plan.stages["vqgan-64"]
    folder.claim = lambda stage: (folder.mark(stage, 1.0) if stage.name == "vqgan-64" else None, claim(stage))[1]
    runner = Runner()
    assert sweep.run_stages(plan, folder, runner, jobs=1, pause=0) == {}
    assert stage.name not in runner.started and folder.holder(stage) is None


def write_results(plan, *names):
    """What the scripts would leave behind."""
    for name in names:
        place = sweep.storage.path(plan.stages[name].out)
        place.parent.mkdir(parents=True, exist_ok=True)
        quality = float(name.rpartition("-")[2])
        if name.startswith("scores"):
            place.with_name(f"{name}.json").write_text(json.dumps({"val_nll": 1 / quality, "codebook_usage": 0.5}))
            continue
        place.mkdir()
        metric = {"val/psnr": quality, "val/codebook_usage": 0.25} if name.startswith("vqgan") else {"val/nll": 9.0}
        rows = [{"step": step, "time": 1.0 + step, "loss": 1 / step, **metric} for step in (1, 2)]
        (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_table_has_a_row_a_trial_of_all_its_stages(plan, folder, capsys):
    with pytest.raises(UserError, match="no results yet"):
        sweep.write_report(plan, folder, "t")
    write_results(plan, *plan.stages)
    for name in plan.stages:
        folder.mark(plan.stages[name], 1.0)
    files = {file.name for file in sweep.write_report(plan, folder, "sizes")}
    assert files == {"report.html", "report.md", "report.csv", "report.tex", "report.png"}
    with open(folder.path / "report.csv") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["codebook_size=64", "codebook_size=256"]
    assert float(rows["codebook_size=256"]["val_psnr"]) == 256 and float(rows["codebook_size=64"]["val_nll"]) == 1 / 64
    assert {(row["codebook_usage"], row.get("val_codebook_usage")) for row in rows.values()} == {("0.5", None)}
    page = (folder.path / "report.html").read_text()
    assert "<h1>sizes</h1>" in page and '<span class="soft">codebook_size=256</span>' in page
    assert all(f"<h3>{name}</h3>" in page for name in ("vqgan-64", "gpt-256"))
    assert "| codebook_size=64 |" in capsys.readouterr().out


def test_the_table_of_half_a_sweep(plan, folder):
    write_results(plan, "vqgan-64")
    folder.mark(plan.stages["vqgan-64"], 1.0)
    sweep.write_report(plan, folder, "t")
    with open(folder.path / "report.csv") as file:
        assert [row["run"] for row in csv.DictReader(file)] == ["codebook_size=64"]


CONFIG = """
from configs import common

def chain(arg=None):
    write = "import json, os, sys; open(sys.argv[1], 'a').write('x'); "
    first = write + "os.makedirs(sys.argv[2], exist_ok=True); "
    first += "row = {{'step': 1, 'time': 1.0, 'loss': 1.0, 'val/psnr': 9.0}}; "
    first += "open(sys.argv[2] + '/metrics.jsonl', 'w').write(json.dumps(row)); "
    first += "sys.exit(int(os.environ.get('FAIL', '0')))"
    second = write + "open(sys.argv[2] + '.json', 'w').write(json.dumps({{'val_nll': float(sys.argv[3][4:])}}))"
    return {
        "model": ("-c", first, "FOLDER/models", "{out}"),
        "scores": ("-c", second, "FOLDER/scores", "{out}", "--n=7", "{model}"),
    }

def sweep():
    return common.product({"scores.temperature": (1, 2)})
"""


def command(tmp_path, *words):
    config = tmp_path / "swept.py"
    config.write_text(CONFIG.replace("FOLDER", str(tmp_path)))
    return [f"--config={config}", f"--out={tmp_path / 'sweep'}", *words]


def test_a_sweep_from_its_command_line_to_its_table(tmp_path, capsys, monkeypatch):
    """Through launch/local.sh: fails, is listed, is resumed, and then there is nothing to do."""
    monkeypatch.setattr(platforms, "check_flags", lambda words: None)
    monkeypatch.setenv("FAIL", "2")
    assert sweep.main(command(tmp_path)) == 1
    assert capsys.readouterr().err.count("needs model-") == 2
    monkeypatch.setenv("FAIL", "0")
    assert sweep.main(command(tmp_path, "--list")) == 0
    assert "2 trials, 3 stages, 3 to do" in capsys.readouterr().out
    assert sweep.main(command(tmp_path, "--dry-run")) == 0
    printed = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(printed) == 3 and printed[0][:2] == ["launch/local.sh", "--with-parent"]
    assert sweep.main(command(tmp_path, "--jobs=2")) == 0
    assert (tmp_path / "models").read_text() == "xx" and (tmp_path / "scores").read_text() == "xx"
    assert "temperature=2" in capsys.readouterr().out
    assert (tmp_path / "sweep" / "report.html").exists() and len(list((tmp_path / "sweep" / "logs").iterdir())) == 3
    assert sweep.main([f"--out={tmp_path / 'sweep'}"]) == 0  # without the config: what was begun is known
    assert (tmp_path / "models").read_text() == "xx" and (tmp_path / "scores").read_text() == "xx"


def test_a_config_that_has_changed_is_said_and_not_mixed_in(tmp_path, capsys, monkeypatch):
    """Going on without --config runs what was begun, or says why not; with it what the file says now."""
    monkeypatch.setattr(platforms, "check_flags", lambda words: None)
    monkeypatch.setenv("FAIL", "2")
    words = command(tmp_path)
    assert sweep.main(words) == 1
    config = tmp_path / "swept.py"
    config.write_text(config.read_text().replace("--n=7", "--n=8"))
    monkeypatch.setenv("FAIL", "0")
    capsys.readouterr()
    assert sweep.main(words[1:]) == 2
    error = capsys.readouterr().err
    assert "scores-temperature=1-" in error and f"is not what {config} says by now" in error and error.count("\n") == 1
    assert (tmp_path / "models").read_text() == "x" and not (tmp_path / "scores").exists()
    assert sweep.main([*words[1:], "--run=1"]) == 2
    assert sweep.main(words) == 0
    assert (tmp_path / "models").read_text() == "xx" and (tmp_path / "scores").read_text() == "xx"
    config.write_text(config.read_text().replace("--n=8", "--n=9"))
    assert sweep.main(words[1:]) == 0  # of what is done nothing is run
    assert sweep.main(words) == 0  # new scores of the same model
    assert (tmp_path / "models").read_text() == "xx" and (tmp_path / "scores").read_text() == "xxxx"


@pytest.mark.slow
def test_two_runners_at_once_run_each_stage_once(tmp_path):
    root, ran, go = tmp_path / "sweep", tmp_path / "ran", tmp_path / "go"
    text = (
        f"import os, time; open({str(ran)!r}, 'a').write('x')\nwhile not os.path.exists({str(go)!r}): time.sleep(0.1)"
    )
    stages = {name: stage(name, root, text=text) for name in "abc"}
    folder = sweep.Folder(str(root))
    folder.write_plan(Plan((Trial("t", {}, tuple(stages)),), stages))
    line = [sys.executable, sweep.ROOT / "launch/sweep.py", f"--out={root}", "--jobs=3"]
    runners = [subprocess.Popen(line, stderr=subprocess.DEVNULL) for _ in range(2)]
    for _ in range(600):
        if ran.exists() and len(ran.read_text()) >= 3:
            break
        time.sleep(0.05)
    go.touch()
    for runner in runners:
        runner.wait(60)
    assert ran.read_text() == "xxx" and len(folder.done(folder.read_plan())) == 3


@pytest.mark.slow
def test_sigterm_reaches_what_runs_and_the_rerun_goes_on(tmp_path):
    saves = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(42)); "
    saves += f"open({str(tmp_path / 'begun')!r}, 'w'); time.sleep(60 if len(sys.argv) < 2 else 0)"
    root = tmp_path / "sweep"
    slow = Stage("slow", "digest", "slow", ("-c", saves), (), f"{root}/slow")
    plan = Plan((Trial("t", {}, ("slow",)),), {"slow": slow})
    sweep.Folder(str(root)).write_plan(plan)
    run = subprocess.Popen(
        [sys.executable, sweep.ROOT / "launch/sweep.py", f"--out={root}"], stderr=subprocess.PIPE, text=True
    )
    for _ in range(600):
        if (tmp_path / "begun").exists():
            break
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    _, error = run.communicate(timeout=60)
    assert run.returncode == PREEMPTED and "to go on: python launch/sweep.py" in error
    assert sweep.Folder(str(root)).done(plan) == set()


def test_mistakes_are_one_line(tmp_path, capsys):
    for words, said in (
        (["--on=moon"], "--on: unknown name 'moon'"),
        (["--jobs=0"], "--jobs=0"),
        (["--on=gke"], "name a bucket"),
        ([], "no sweep.json there"),
        (["--config=configs/none.py"], "no such file"),
    ):
        assert sweep.main([f"--out={tmp_path / 'none'}", *words]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert not (tmp_path / "none").exists()


# Other platforms

FLAGS = {"gke": ["--image=i", "--tpu=v5e-16"], "tpu_vm": ["--zone=z", "--tpu=v5e-16"]}


def test_clusters_get_the_launchers_flags(plan):
    flags = ["--image=i", "--tpu=v5e-16"]
    line = platforms.launch_line("gke", flags, plan.stages["gpt-64"])
    assert line == [sys.executable, "launch/gke.py", "--wait", "--name=gpt-64", *flags, "--", "python", "-c", "pass"]
    assert platforms.launch_line("tpu_vm", ["--zone=z"], plan.stages["gpt-64"])[:3] == [
        "launch/tpu_vm.sh",
        "--name=gpt-64",
        "--zone=z",
    ]


def test_a_dry_run_on_a_cluster_prints_what_is_left(plan, bucket, capsys):
    folder = sweep.Folder(bucket)
    folder.write_plan(plan)
    folder.mark(plan.stages["vqgan-64"], 1.0)
    assert sweep.main([f"--out={bucket}", "--on=gke", "--dry-run", "--", "--image=i", "--tpu=v5e-16"]) == 0
    printed = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    left = [stage for name, stage in plan.stages.items() if name != "vqgan-64"]
    assert printed == [platforms.launch_line("gke", ["--image=i", "--tpu=v5e-16"], stage) for stage in left]


@pytest.mark.parametrize(
    ("on", "ends"), [("gke", "--delete"), ("tpu_vm", "--only=delete"), ("slurm", ""), ("local", "")]
)
def test_what_a_stopped_launcher_leaves_running_is_said(plan, on, ends):
    """The line is one that the launcher takes."""
    line = platforms.delete_line(on, FLAGS.get(on, []), plan.stages["gpt-64"])
    assert (line[-1] if line else "") == ends
    if line:
        done = subprocess.run([*line, "--dry-run"], cwd=sweep.ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "delete" in done.stdout and "gpt-64" in done.stdout, done.stderr


def test_a_sweep_stopped_on_a_cluster_says_what_runs_there(plan, bucket, monkeypatch, capsys):
    """Of what it has begun it prints how to delete it, and of nothing else."""
    folder, runner = sweep.Folder(bucket), Runner(looks=10**6)
    folder.write_plan(plan)

    def start(stage):
        os.kill(os.getpid(), signal.SIGTERM)
        return runner(stage)

    monkeypatch.setattr(sweep, "check_unchanged", lambda plan, stages: None)
    monkeypatch.setattr(platforms, "launcher", lambda on, flags, folder, jobs: start)
    assert sweep.main([f"--out={bucket}", "--on=gke", "--", *FLAGS["gke"]]) == PREEMPTED
    said = capsys.readouterr().err.splitlines()
    told = [shlex.split(line.partition("to delete it: ")[2]) for line in said if "to delete it: " in line]
    assert told == [platforms.delete_line("gke", FLAGS["gke"], plan.stages[name]) for name in runner.started]
    assert len(told) == 1 and "to go on:" in said[-1]


def test_slurm_gets_an_array_a_depth(plan, folder, fakes, monkeypatch, capsys):  # noqa: F811
    """Each array waits for the one before, only what is not done is in it, and the report comes last."""
    for name, value in fakes.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    folder.mark(plan.stages["vqgan-64"], 1.0)
    fakes.answer("sbatch", answers=[("11\n", 0), ("12;cluster\n", 0), ("13\n", 0), ("14\n", 0)])
    assert sweep.main([f"--out={folder.path}", "--on=slurm", "--jobs=2", "--", "--nodes=2"]) == 0
    arrays = [next((word for word in call if word.startswith("--array")), "") for call in fakes.calls]
    assert arrays == ["--array=3%2", "--array=1,4%2", "--array=2,5%2", ""]
    after = [next((word for word in call if word.startswith("--dependency")), "") for call in fakes.calls]
    assert after == ["", *(f"--dependency=afterany:{job}" for job in (11, 12, 13))]
    assert all("--nodes=2" in call for call in fakes.calls) and fakes.calls[-1][-1] == "--report"
    submitted = folder.name_of(plan)
    assert fakes.calls[0][-3:] == [f"--out={folder.path}", f"--plan={submitted}", "--run"]
    assert folder.read_plan(submitted) == plan
    assert "--nodes=1" in fakes.calls[-1][fakes.calls[-1].index("--nodes=2") :]  # the last one counts


def test_slurm_that_refuses_is_one_line(folder, fakes, monkeypatch, capsys):  # noqa: F811
    for name, value in fakes.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    fakes.answer("sbatch", answers=[("", 1)])
    assert sweep.main([f"--out={folder.path}", "--on=slurm"]) == 2
    assert capsys.readouterr().err.startswith("error: could not submit") and len(fakes.calls) == 1


def test_a_task_of_an_array_runs_its_stage(tmp_path, monkeypatch, capsys):
    root = tmp_path / "sweep"
    text = f"import os; open({str(tmp_path / 'ran')!r}, 'a').write(os.environ.get('SLURM_PROCID', '-'))"
    stages = [stage("first", root, text=text), stage("second", root, ["first"], text="raise SystemExit(5)")]
    folder = sweep.Folder(str(root))
    plan = Plan((Trial("t", {}, ("first", "second")),), {s.name: s for s in stages})
    folder.write_plan(plan)
    monkeypatch.setenv(sweep_folder.TASK, "1")
    assert sweep.main([f"--out={root}", "--run"]) == 2 and "needs first" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert sweep.main([f"--out={root}", "--run=0"]) == 0 and not folder.done(plan)  # the first process alone notes it
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert sweep.main([f"--out={root}", "--run=0"]) == 0 and folder.done(plan) == {"first"}
    assert sweep.main([f"--out={root}", "--run"]) == 5 and folder.done(plan) == {"first"}
    assert (tmp_path / "ran").read_text() == "10"
    assert sweep.main([f"--out={root}", "--run=0"]) == 0 and (tmp_path / "ran").read_text() == "10"  # is done


@pytest.mark.parametrize("process", ["0", "1"])
def test_a_task_does_not_run_what_ended_well_while_it_waited(tmp_path, monkeypatch, process):
    """Another runner held the stage as the task looked first, and has marked it and given it up since."""
    ran = stage("first", tmp_path / "sweep", text=f"open({str(tmp_path / 'ran')!r}, 'w')")
    folder = sweep.Folder(str(tmp_path / "sweep"), as_job=True)
    plan = Plan((Trial("t", {}, ("first",)),), {"first": ran})
    monkeypatch.setenv("SLURM_PROCID", process)
    asks = "claim" if process == "0" else "holder"
    ask = getattr(folder, asks)
    monkeypatch.setattr(folder, asks, lambda stage: (folder.mark(stage, 1.0), ask(stage))[1])
    assert sweep.run_one(plan, folder, 0) == 0 and not (tmp_path / "ran").exists()
    assert folder.holder(ran) is None and not list(folder.claims(ran).iterdir() if process == "0" else ())


def test_an_array_counts_the_stages_that_it_was_submitted_with(tmp_path, monkeypatch, capsys):
    """A later plan of the same folder, and what another job holds, do not change what a task runs."""
    root = tmp_path / "sweep"
    stages = [stage(name, root, text=f"open({str(tmp_path / name)!r}, 'w')") for name in ("first", "second")]
    plan = Plan((Trial("t", {}, ("first", "second")),), {s.name: s for s in stages})
    folder = sweep.Folder(str(root))
    submitted = folder.submit_plan(plan)
    folder.write_plan(dataclasses.replace(plan, stages={s.name: s for s in reversed(stages)}))
    monkeypatch.setenv(sweep_folder.TASK, "0")
    held_by(folder, stages[0], os.getppid())
    for process in ("0", "1"):
        monkeypatch.setenv("SLURM_PROCID", process)
        assert sweep.main([f"--out={root}", f"--plan={submitted}", "--run"]) == 2
        assert "first: is run by process" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_PROCID", "0")
    folder.release(stages[0])
    assert sweep.main([f"--out={root}", f"--plan={submitted}", "--run"]) == 0
    assert (tmp_path / "first").exists() and not (tmp_path / "second").exists()


@pytest.mark.slow
def test_scripts_check_their_flags():
    """A flag that evaluate.py does not have, or a value of another type, stops a sweep before it starts."""
    platforms.check_flags(("evaluate.py", "--workdir=x", "--out=y.json", "--samples=0"))
    for flag, said in (("--sampels=3", "sampels"), ("--batch=many", "batch")):
        with pytest.raises(UserError, match=said):
            platforms.check_flags(("evaluate.py", "--workdir=x", "--out=y.json", flag))
