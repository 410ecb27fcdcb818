"""The watchdog: it ends a host on which nothing moves, and names the one that the others wait for."""

import threading
import time

import pytest
from etils import epath

from vqgan_jax import storage
from vqgan_jax.exit_codes import LOST
from vqgan_jax.watchdog import Watchdog, place_in_job, whereabouts


def said(step=7, doing="in a step", since=0.0, time=100.0, host="node"):
    return dict(host=host, step=step, doing=doing, since=since, time=time)


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        ({0: said(), 2: said()}, "never seen: host 1, 3 of 0 to 3"),
        (
            {0: said(), 1: said(), 2: said(time=20.0, host="n2"), 3: said()},
            "no longer heard of: host 2 (n2): in a step, step 7",
        ),
        (
            {0: said(), 1: said(doing="waiting for data", host="n1"), 2: said(), 3: said()},
            "behind the others: host 1 (n1): waiting for data, step 7, since 100 s",
        ),
        ({0: said(), 1: said(), 2: said(), 3: said(step=6)}, "behind the others: host 3 (node): in a step, step 6"),
        (dict.fromkeys(range(4), said()), "so are all others, in step 7"),
    ],
)
def test_whom_the_others_wait_for(reports, expected):
    assert whereabouts(reports, 4, 60).startswith(expected)


def test_a_host_that_waits_too_long_ends_and_names_who_is_missing(tmp_path, capsys):
    ended = threading.Event()
    codes = []
    with Watchdog(epath.Path(tmp_path), 0, 2, 0.4, end=lambda code: (codes.append(code), ended.set())) as dog:
        dog.beat(3, "in a step")
        assert ended.wait(5)
    assert codes == [LOST]
    assert "host 0 of 2 has been in a step (step 3)" in (err := capsys.readouterr().err)
    assert "never seen: host 1" in err and not list(tmp_path.iterdir())


def test_what_a_bucket_raises_ends_neither_the_watchdog_nor_its_job(monkeypatch, tmp_path, caplog, capsys):
    HttpError = type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})

    def fail(*_, **__):
        raise HttpError("503 Backend Error")

    for name in ("unlink", "write_bytes", "read_text"):
        monkeypatch.setattr(type(epath.Path(tmp_path)), name, fail)
    monkeypatch.setattr(storage, "write_json", fail)
    codes = []
    with pytest.raises(SystemExit, match="42"), Watchdog(epath.Path(tmp_path), 0, 2, 0.2, end=codes.append) as dog:
        dog._thread.join(5)  # it has told several times, and come to its end
        raise SystemExit(42)
    assert codes == [LOST] and "never seen: host 0, 1" in capsys.readouterr().err
    assert caplog.text.count("503 Backend Error") == 1


def test_beats_and_what_may_take_long_keep_it_quiet(tmp_path):
    with Watchdog(epath.Path(tmp_path), 0, 1, 0.4, end=lambda code: pytest.fail("ended")) as dog:
        for step in range(6):
            time.sleep(0.1)
            dog.beat(step, "in a step")
        dog.beat(6, "evaluating", timed=False)
        time.sleep(0.6)
        assert (tmp_path / "0.json").exists()


def test_place_in_job(monkeypatch):
    told = ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES", "SLURM_PROCID", "SLURM_NTASKS", "TPU_WORKER_ID")
    for name in (*told, "MEGASCALE_SLICE_ID", "MEGASCALE_NUM_SLICES"):
        monkeypatch.delenv(name, raising=False)
    assert place_in_job() is None
    monkeypatch.setenv("TPU_WORKER_ID", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b,c")
    assert place_in_job() == (1, 3)
    monkeypatch.setenv("MEGASCALE_SLICE_ID", "2")  # Multislice counts workers in their slice
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "4")
    assert place_in_job() == (7, 12)
    monkeypatch.setenv("SLURM_PROCID", "5")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert place_in_job() == (5, 8)
