"""Following a run: oldest first, the best kept, nothing that another command scored, and a trainer that deletes."""

import json
import shutil

import jax
import pytest
from jax.experimental import multihost_utils

from vqgan_jax import storage
from vqgan_jax.config import UserError
from vqgan_jax.scoring import follow

ASKED = {"preset": "adm", "samples": 10}


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def seal(workdir, step):
    folder = workdir / "checkpoints" / str(step)
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


def run(folder, read, *, out="f.json", definition=ASKED, clock=None, sleep=None, total=6, timeout=25):
    clock = clock or Clock()
    return follow.follow(
        storage.path(folder),
        read,
        storage.path(folder / out),
        definition=definition,
        total=total,
        timeout=timeout,
        clock=clock,
        sleep=sleep or clock.sleep,
    )


def opener(fids, saved, metric="fid"):
    return lambda step: (lambda: {metric: fids[step]}, lambda folder: saved.append(step))


def test_following_waits_scores_oldest_first_and_keeps_the_best(tmp_path):
    order, saved, clock = [], [], Clock()
    seal(tmp_path, 4)
    seal(tmp_path, 2)

    def sleep(seconds):
        clock.sleep(seconds)
        if clock.now == 30:
            seal(tmp_path, 6)

    def read(step):
        order.append(step)
        return opener({2: 5.0, 4: 3.0, 6: 4.0}, saved)(step)

    found = run(tmp_path, read, clock=clock, sleep=sleep, timeout=100)
    assert order == [2, 4, 6] and saved == [2, 4] and clock.now == 30  # the run is finished: no waiting
    assert [row["scores"]["fid"] for row in found["rows"]] == [5.0, 3.0, 4.0] and found["best"]["step"] == 4
    assert json.loads((tmp_path / "best.json").read_text()) == found["best"]
    again = run(tmp_path, read, clock=clock, total=8)
    assert order == [2, 4, 6] and again == found and clock.now == 60  # nothing new: given up after the timeout


def test_rows_and_the_best_of_another_command_are_refused(tmp_path):
    seal(tmp_path, 2)
    saved: list[int] = []
    read = opener({2: 5.0, 4: 9.0}, saved)
    found = run(tmp_path, read, total=2)
    for other in (ASKED | {"preset": "clean"}, ASKED | {"samples": 20}):
        with pytest.raises(UserError, match="--out=.*f.json: holds scores of other data or settings"):
            run(tmp_path, read, definition=other, total=2)
        with pytest.raises(UserError, match="best.json and best_fid were chosen by other data or settings"):
            run(tmp_path, read, definition=other, out="g.json", total=2)
    assert saved == [2] and json.loads((tmp_path / "f.json").read_text()) == found
    (tmp_path / "f.json").unlink()
    shutil.rmtree(tmp_path / "checkpoints")
    seal(tmp_path, 4)
    assert run(tmp_path, read, total=4)["best"]["step"] == 2 and saved == [2]  # the same command's best outlives rows


def test_a_checkpoint_deleted_while_it_was_read_is_passed_over(tmp_path):
    clock, saved = Clock(), []
    seal(tmp_path, 2)
    seal(tmp_path, 4)

    def sleep(seconds):  # the manifest still stood when the read failed
        clock.sleep(seconds)
        shutil.rmtree(tmp_path / "checkpoints" / "2", ignore_errors=True)

    def read(step):
        if step == 2:
            raise ValueError("half of it is gone")
        return opener({4: 1.0}, saved, "rfid")(step)

    assert [row["step"] for row in run(tmp_path, read, clock=clock, sleep=sleep, total=4)["rows"]] == [4]


def test_what_fails_otherwise_is_not_passed_over(tmp_path):
    seal(tmp_path, 2)

    def broken(step):
        raise UserError("another mistake")

    def misscored(step):
        def score():
            shutil.rmtree(tmp_path / "checkpoints" / "2")
            raise OSError("no classifier")

        return score, lambda folder: None

    with pytest.raises(UserError, match="another mistake"):
        run(tmp_path, broken)
    with pytest.raises(OSError, match="no classifier"):  # the checkpoint had been read: its end is no excuse
        run(tmp_path, misscored)


def test_hosts_agree_where_one_alone_fails_or_sees_the_file(tmp_path, monkeypatch):
    """As a second host of two sees it: the first has a step 2 done, and could not read step 4 itself."""
    done = {"rows": [{"step": 2, "scores": {"fid": 5.0}}], "key": follow.digest({"definition": ASKED}), "best": {}}
    seen = iter([[done, {}], [2, 4], [2], [2], True])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(follow.parallel, "of_first_host", lambda make: next(seen))
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda failed: follow.np.array([True, bool(failed)]))

    def read(step):
        assert step == 4
        return lambda: pytest.fail("the other host does not score"), lambda folder: None

    assert run(tmp_path, read) == done and next(seen, None) is None
