"""Why a process ended: codes, how they are printed, what is tried again, and the table for users."""

import errno
import os
import re
import signal
import time
from pathlib import Path

import jax
import pytest

from launch import gke
from vqgan_jax import cli, exit_codes, storage
from vqgan_jax.config import UserError
from vqgan_jax.storage import StorageError, retried

BUCKET = type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})
ENDS = [
    (UserError("config.x: mend it"), exit_codes.USER_ERROR),
    (StorageError("the disk is away"), exit_codes.STORAGE),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), exit_codes.USER_ERROR),
    (BUCKET("503 Backend Error"), exit_codes.STORAGE),
    (BUCKET("Forbidden: gs://b/x"), exit_codes.USER_ERROR),
    *((OSError(number, os.strerror(number)), exit_codes.USER_ERROR) for number in (errno.ENOSPC, errno.EROFS)),
    *((OSError(number, os.strerror(number)), exit_codes.STORAGE) for number in (errno.EIO, errno.ESTALE)),
]


@pytest.mark.parametrize(("error", "code"), ENDS)
def test_what_a_user_should_hear_of_is_one_line_and_a_code(capsys, error, code):
    def fail():
        raise error

    assert cli.exit_code(fail) == code
    said = capsys.readouterr().err
    assert said.startswith("error: ") and str(error) in said and said.count("\n") == 1


def test_other_ends_are_left_alone():
    assert cli.exit_code(lambda: None) == 0 and cli.exit_code(lambda: 7) == 7
    with pytest.raises(jax.errors.JaxRuntimeError):
        cli.exit_code(lambda: exec("raise jax.errors.JaxRuntimeError('INTERNAL: a bug')", {"jax": jax}))
    with pytest.raises(KeyError):
        cli.exit_code(lambda: {}["x"])
    with pytest.raises(FileNotFoundError):
        cli.exit_code(lambda: open("/no/such/file"))
    with pytest.raises(SystemExit) as exit_:
        cli.exit_code(lambda: exec("raise SystemExit(42)"))
    assert exit_.value.code == exit_codes.PREEMPTED


def test_users_find_every_code_in_one_table():
    table = (Path(__file__).parents[1] / "docs" / "survival.md").read_text()
    codes = {value for name, value in vars(exit_codes).items() if name.isupper()}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.M)} == codes | {0, 1}
    assert gke.FREE == (exit_codes.PREEMPTED, exit_codes.STORAGE) and gke.USER_ERROR == exit_codes.USER_ERROR


def test_told_to_go_before_its_first_step_a_trainer_exits_as_preempted():
    previous = signal.signal(signal.SIGTERM, cli.leave_when_told)
    try:
        with pytest.raises(SystemExit) as exit_:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert exit_.value.code == exit_codes.PREEMPTED


class Flaky:
    def __init__(self, *errors):
        self.errors, self.calls = list(errors), 0

    def __call__(self):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    slept = []
    monkeypatch.setattr(storage.time, "sleep", slept.append)
    return slept


def of(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def test_what_may_pass_is_tried_again_later_and_later(waits):
    assert retried(Flaky(of(errno.EIO), BUCKET("502"), ConnectionResetError("gone"))) == "done"
    assert waits == sorted(waits) == list(storage.BACKOFF[:3])
    endless = Flaky(*[of(errno.EIO)] * 99)
    with pytest.raises(StorageError, match="start again"):
        retried(endless)
    assert endless.calls == len(storage.BACKOFF) + 1


LASTING = [of(n) for n in (errno.ENOSPC, errno.ENOENT, errno.EACCES, errno.EROFS, errno.EDQUOT)]


@pytest.mark.parametrize("error", [*LASTING, OSError("Forbidden: gs://b/x"), UserError("no"), KeyError("bug")])
def test_what_will_not_pass_is_tried_once(waits, error):
    work = Flaky(error)
    with pytest.raises(type(error)):
        retried(work)
    assert work.calls == 1 and not waits


def test_an_upload_is_tried_again_whole(bucket, tmp_path, monkeypatch):
    target = storage.path(bucket) / "log"
    real, failures = type(target).write_bytes, [BUCKET("503"), BUCKET("503")]

    def write(self, data):
        if failures:
            raise failures.pop()
        return real(self, data)

    monkeypatch.setattr(type(target), "write_bytes", write)
    storage.write_bytes(target, b"all of it")
    assert target.read_bytes() == b"all of it" and not failures


@pytest.mark.parametrize(
    ("behind", "code"),
    [
        (jax.errors.JaxRuntimeError("UNAVAILABLE: task 1 is gone"), exit_codes.LOST),
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), exit_codes.LOST),  # at its dispatch
        (ValueError("a Connection of ours"), exit_codes.STORAGE),
        (None, exit_codes.STORAGE),
    ],
)
def test_of_several_hosts_one_that_lost_another_or_its_storage_leaves_at_once(monkeypatch, behind, code):
    """Orbax makes a TimeoutError of a host that is gone, and the checkpoints an error of storage of that."""

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(cli, "_LAST_WORD_SECONDS", 0)
    monkeypatch.setattr(os, "_exit", leave)
    if not behind:
        for error, expected in ENDS:
            with pytest.raises(SystemExit) as exit_, cli.leave_with_others():
                raise error
            assert exit_.value.code == expected
        with pytest.raises(KeyError), cli.leave_with_others():
            raise KeyError("a bug")
    timeout, failed = TimeoutError("a barrier"), StorageError("checkpoint of step 3 was not saved")
    timeout.__cause__ = behind
    failed.__cause__ = timeout
    with pytest.raises(SystemExit) as exit_, cli.leave_with_others():
        raise failed
    assert exit_.value.code == code
