"""Commands in a row: a child ends as it will, and one that ended well need not run again."""

import json
import os
import signal
import sys
import threading
import time

from vqgan_jax.exit_codes import PREEMPTED
from vqgan_jax.tools import steps


def test_a_child_gives_its_code():
    for code in (0, 5):
        assert steps.run_child([sys.executable, "-c", f"raise SystemExit({code})"], os.environ) == code
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert steps.run_child([sys.executable, "-c", killed], os.environ) == 128 + signal.SIGKILL


def test_a_child_runs_at_the_root_with_its_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = f"import os; open({str(tmp_path / 'x')!r}, 'w').write(os.getcwd() + os.environ['GIVEN'])"
    assert steps.run_child([sys.executable, "-c", code], {**os.environ, "GIVEN": "!"}) == 0
    assert (tmp_path / "x").read_text() == f"{steps.ROOT}!"


def test_a_child_may_save_when_the_demo_is_told_to_stop(tmp_path):
    """SIGTERM is handed on, and the demo waits for the child's own end; its own handlers are then back."""
    started, saved = tmp_path / "started", tmp_path / "saved"
    child = f"""
import signal, sys, time
def stop(number, frame):
    time.sleep(0.6)
    open({str(saved)!r}, "w").close()
    sys.exit({PREEMPTED})
signal.signal(signal.SIGTERM, stop)
open({str(started)!r}, "w").close()
time.sleep(60)
"""

    def stop_once_started():
        for _ in range(600):
            if started.exists():
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.05)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=stop_once_started)
    thread.start()
    code = steps.run_child([sys.executable, "-c", child], os.environ)
    thread.join()
    assert code == PREEMPTED and saved.exists() and signal.getsignal(signal.SIGTERM) is before


def test_what_ended_well_is_left_out_when_asked(tmp_path, capsys):
    made = [steps.Step(name, ("sample.py", f"--out={{out}}/{name}"), seconds=1) for name in "abc"]
    ran, codes = [], {"b": 1}

    def run(argv, environment):
        name = argv[-1][-1]
        ran.append(name)
        return codes.get(name, 0)

    def start(**how):
        ran.clear()
        whole = steps.Steps(tmp_path, made, tool="x", run=run)
        try:
            whole.run_all(**how)
        except steps.ChildFailed as error:
            assert error.code == 1 and "--out" in str(error)
        return list(ran)

    assert start(skip_finished=True) == ["a", "b"]
    codes.clear()
    assert start(skip_finished=True) == ["b", "c"]
    assert "[2/3] b" in capsys.readouterr().out
    assert start(skip_finished=True) == [] and start() == ["a", "b", "c"]
    assert [entry["exit"] for entry in json.loads((tmp_path / "commands.json").read_text())[:3]] == [0, 1, 0]
