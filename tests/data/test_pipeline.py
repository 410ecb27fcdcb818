"""The pipeline: rows are a pure function of (seed, position), corrupt examples are replaced, dead workers too."""

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from vqgan_jax.config import UserError
from vqgan_jax.data.pipeline import Pipeline, evaluation, example_index, pipeline
from vqgan_jax.data.prefetch import prefetch_to_device
from vqgan_jax.data.source import CorruptExample

EIGHT = tuple(range(8))
ROOT = Path(__file__).parents[2]


@dataclasses.dataclass
class Numbers:
    """Examples that are their own index; those in `corrupt` cannot be read."""

    count: int
    corrupt: frozenset[int] = frozenset()
    classes = ()

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        assert 0 <= index < self.count
        if index in self.corrupt:
            raise CorruptExample(f"{index}.png", "broken")
        return {"index": index}


def draw(example, rng):
    """Keeps the index and adds what a random augmentation would draw."""
    return {"index": np.int32(example["index"]), "noise": rng.random(2, np.float32)}


def open_numbers(source=None, *, rows=EIGHT, global_batch=8, seed=0, start=0, transform=draw, share=1.0, **how):
    return pipeline(
        Numbers(21) if source is None else source,
        rows=np.array(rows),
        global_batch=global_batch,
        seed=seed,
        start=start,
        transform=transform,
        threads=how.get("threads", 0),
        processes=how.get("processes", 0),
        max_corrupt_share=share,
    )


def take(steps, *args, **kwargs):
    with open_numbers(*args, **kwargs) as batches:
        return [next(batches) for _ in range(steps)]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("examples", [1, 2, 21, 100, 70_000])
def test_each_epoch_visits_every_example_once_in_a_new_order(examples):
    epochs = [
        [example_index(e * examples + i, examples, 3) for i in range(examples)]
        for e in range(3 if examples < 1000 else 1)
    ]
    for epoch in epochs:
        assert sorted(epoch) == list(range(examples))
    if examples > 2:
        assert all(epoch != sorted(epoch) for epoch in epochs)
        assert len(set(map(tuple, epochs))) == len(epochs)


def test_a_batch_may_span_epochs():
    indices = np.concatenate([batch["index"] for batch in take(21)])
    np.testing.assert_array_equal(np.bincount(indices), np.full(21, 8))
    assert [batch["index"].shape for batch in take(2, rows=range(3))] == [(3,), (3,)]


def test_the_seed_decides_order_and_augmentation():
    base, other = take(3), take(3, seed=1)
    assert_same(base, take(3))
    assert any((a["index"] != b["index"]).any() for a, b in zip(base, other, strict=True))
    assert not np.isin(base[0]["noise"], other[0]["noise"]).any()
    drawn = np.concatenate([batch["noise"] for batch in take(21)])
    assert len(np.unique(drawn[:, 0])) == len(drawn)  # every position draws anew, also the same example later


@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("interleaved", [True, False])
def test_hosts_together_read_the_global_batch(hosts, interleaved):
    whole = take(4)
    rows = np.arange(8).reshape(-1, hosts).T if interleaved else np.arange(8).reshape(hosts, -1)
    parts = [take(4, rows=mine) for mine in rows]
    for step in range(4):
        for key in whole[step]:
            together = np.empty_like(whole[step][key])
            for mine, part in zip(rows, parts, strict=True):
                together[mine] = part[step][key]
            np.testing.assert_array_equal(together, whole[step][key])


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_do_not_change_batches(threads):
    """40 rows are several pieces of work, which threads finish in any order."""

    def slow(example, rng):
        time.sleep(0.002 * (example["index"] % 3))
        return draw(example, rng)

    many = {"rows": range(40), "global_batch": 40}
    assert_same(take(4, **many), take(4, threads=threads, transform=slow, **many))


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_do_not_change_batches_and_corrupt_examples_are_counted(processes):
    many = {"source": Numbers(21, frozenset({4, 5})), "rows": range(40), "global_batch": 40}
    with open_numbers(processes=processes, threads=1, **many) as batches:
        assert_same([next(batches) for _ in range(3)], take(3, **many))
        assert batches.replaced == {"4.png": "broken", "5.png": "broken"}


@pytest.mark.parametrize("hosts, processes, threads", [(1, 2, 2), (2, 1, 1), (2, 0, 3), (4, 0, 1), (4, 2, 0)])
def test_a_global_batch_is_the_same_for_any_hosts_and_workers_and_from_any_step_on(hosts, processes, threads):
    """What a step trains on is the same set of rows, each in its place, however it is read."""
    whole = take(5, rows=range(40), global_batch=40)[2:]
    shards = np.arange(40).reshape(hosts, -1)
    for rows in shards if processes == 0 else shards[-1:]:  # starting a process takes seconds
        part = take(3, rows=rows, global_batch=40, start=2 * 40, processes=processes, threads=threads)
        assert_same(part, [{key: values[rows] for key, values in batch.items()} for batch in whole])


def test_another_batch_size_goes_on_where_the_run_was():
    """Three batches of 8, then batches of 6: each epoch still holds every example once, with the noise of its place."""
    singles = take(24 + 4 * 6, rows=(0,), global_batch=1)
    mixed = take(3) + take(4, rows=range(6), global_batch=6, start=24)
    for key in ("index", "noise"):
        np.testing.assert_array_equal(*(np.concatenate([b[key] for b in batches]) for batches in (singles, mixed)))
    indices = np.concatenate([batch["index"] for batch in mixed])
    assert sorted(indices[:21]) == sorted(indices[21:42]) == list(range(21))


def kill_a_worker():
    worker = next(child for child in multiprocessing.active_children() if child.name.startswith("grain"))
    os.kill(worker.pid, signal.SIGKILL)


def test_a_worker_process_that_is_killed_is_replaced_and_no_batch_changes(caplog):
    many = {"rows": range(40), "global_batch": 40}
    with open_numbers(processes=1, threads=1, **many) as batches:
        before = [next(batches)]
        kill_a_worker()
        assert_same(before + [next(batches) for _ in range(5)], take(6, **many))
    assert [r.getMessage() for r in caplog.records if "exit code -9; started anew" in r.getMessage()]


def test_workers_that_die_again_and_again_end_the_run_in_one_line(monkeypatch):
    opened = []

    class Dead:
        """Grain's iterator whose worker dies."""

        def __init__(self, batches):
            opened.append(batches)

        def __next__(self):
            raise RuntimeError("Worker process was terminated unexpectedly with exit code -9. Search the logs")

        def close(self):
            pass

    monkeypatch.setattr(Pipeline, "_open", lambda batches: Dead(batches))
    with open_numbers(processes=2) as batches:
        with pytest.raises(UserError, match="config.data.processes=2: .*exit code -9.* 0 to read in threads") as error:
            next(batches)
    assert len(opened) == 3 and "\n" not in str(error.value)
    with open_numbers() as batches:  # without worker processes it is no worker's death
        with pytest.raises(RuntimeError):
            next(batches)


def test_a_user_error_in_a_worker_process_arrives_as_itself():
    with open_numbers(transform=refuse, processes=1, threads=1) as batches:
        with pytest.raises(UserError, match="config.key"):
            next(batches)


def refuse(example, rng):
    raise UserError("config.key: mend it")


@pytest.mark.parametrize("threads", [0, 3])
def test_a_user_error_in_a_thread_arrives_as_itself(threads):
    with open_numbers(transform=refuse, threads=threads) as batches:
        with pytest.raises(UserError, match="config.key"):
            next(batches)


@pytest.mark.parametrize("step", [1, 5, 1000])
def test_resumes_at_any_step(step):
    assert_same(take(2, start=8 * step), take(step + 2)[step:])


def test_corrupt_examples_are_replaced_by_the_next_and_nothing_else_moves():
    clean = take(6)
    with open_numbers(Numbers(21, frozenset({7, 8, 20}))) as batches:
        damaged = [next(batches) for _ in range(6)]
        assert batches.replaced == {f"{i}.png": "broken" for i in (7, 8, 20)}
    mended = {7: 9, 8: 9, 20: 0}
    for a, b in zip(clean, damaged, strict=True):
        np.testing.assert_array_equal([mended.get(i, i) for i in a["index"]], b["index"])
        np.testing.assert_array_equal(a["noise"], b["noise"])


def test_too_many_corrupt_examples_stop_the_run_and_are_named():
    source = Numbers(1000, frozenset(range(0, 1000, 5)))
    with open_numbers(source, share=0.1) as batches:
        with pytest.raises(UserError, match=r"^\d+ of \d+ .* \d+\.png.* config\.data\.max_corrupt_share") as caught:
            for _ in range(20):
                next(batches)
    count, _, seen = str(caught.value).split()[:3]
    assert 100 <= int(seen) < 120 and int(count) > 0.1 * int(seen)
    assert len(take(50, source, share=0.25)) == 50


def test_a_small_source_is_judged_after_one_epoch():
    with open_numbers(Numbers(21, frozenset({3, 4})), share=0.05) as batches:
        with pytest.raises(UserError, match="2 of 21"):
            for _ in range(6):
                next(batches)


def test_damage_in_a_row_is_not_taken_for_damage_at_large():
    source = Numbers(1000, frozenset(range(150)))
    with open_numbers(source, share=0.25) as batches:
        for _ in range(60):
            next(batches)
        assert len(batches.replaced) > 100


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_a_source_of_which_nothing_can_be_read_ends(share):
    with open_numbers(Numbers(300, frozenset(range(300))), share=share) as batches:
        with pytest.raises(UserError, match="max_corrupt_share"):
            next(batches)


def test_an_empty_source_is_refused():
    with pytest.raises(UserError):
        open_numbers(Numbers(0))
    with pytest.raises(UserError):
        evaluation(Numbers(0), rows=np.arange(2), global_batch=2, transform=draw)


def evaluate(source, *, rows=(0, 1, 2, 3), **options):
    return evaluation(source, rows=np.array(rows), global_batch=4, transform=draw, **options)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("threads", [0, 2])
def test_evaluation_sees_each_example_once_in_order(count, threads):
    batches = evaluate(Numbers(count), threads=threads)
    seen = list(batches)
    assert len(seen) == len(batches) == -(-count // 4)
    assert all(batch["index"].shape == batch["valid"].shape == (4,) for batch in seen)
    assert [i for batch in seen for i in batch["index"][batch["valid"]]] == list(range(count))
    assert all(batch["valid"].dtype == bool for batch in seen)
    assert_same(seen, list(batches))


def test_evaluation_over_hosts_is_the_whole():
    whole = list(evaluate(Numbers(5)))
    parts = [list(evaluate(Numbers(5), rows=rows)) for rows in ([0, 2], [1, 3])]
    for step, batch in enumerate(whole):
        for key in batch:
            np.testing.assert_array_equal(batch[key][[0, 2]], parts[0][step][key])
            np.testing.assert_array_equal(batch[key][[1, 3]], parts[1][step][key])


def test_a_limited_evaluation_is_spread_over_the_source():
    seen = np.concatenate([batch["index"][batch["valid"]] for batch in evaluate(Numbers(100), limit=10)])
    np.testing.assert_array_equal(seen, np.arange(0, 100, 10))
    assert sum(batch["valid"].sum() for batch in evaluate(Numbers(5), limit=10)) == 5


def test_corrupt_examples_are_not_valid_in_evaluation():
    seen = list(evaluate(Numbers(6, frozenset({1, 5}))))
    assert np.concatenate([batch["valid"] for batch in seen]).tolist() == [1, 0, 1, 1, 1, 0, 0, 0]
    with pytest.raises(UserError):
        list(evaluate(Numbers(2, frozenset({0, 1}))))


def test_unreadable_examples_of_an_evaluation_are_named_once():
    batches = evaluate(Numbers(6, frozenset({1, 5})))
    assert len(list(batches)) == len(list(batches))
    assert batches.unreadable == {"1.png": "broken", "5.png": "broken"}


def test_a_part_of_a_source_is_evaluated_as_in_the_whole():
    """The generators belong to the examples, whatever part they are read in; another seed draws others."""
    source = Numbers(11, frozenset({6}))
    whole, part = (list(evaluate(source, part=part, seed=1)) for part in (None, range(4, 9)))
    rows, few = ({k: np.concatenate([b[k] for b in batches]) for k in batches[0]} for batches in (whole, part))
    assert few["index"][few["valid"]].tolist() == [4, 5, 7, 8] and few["valid"].tolist() == [1, 1, 0, 1, 1, 0, 0, 0]
    np.testing.assert_array_equal(few["noise"][:2], rows["noise"][4:6])
    assert not np.isin(next(iter(evaluate(source, seed=2)))["noise"], rows["noise"]).any()


def test_prefetch_passes_everything_on_in_order_and_ends():
    with prefetch_to_device(({"i": i} for i in range(5)), lambda batch: batch["i"] * 10) as batches:
        assert list(batches) == [0, 10, 20, 30, 40]
        assert list(batches) == []
        assert batches.wait_seconds >= 0


def test_a_batch_that_was_looked_at_comes_again():
    with prefetch_to_device(iter(range(3)), lambda batch: batch) as batches:
        assert batches.peek() == 0
        assert list(batches) == [0, 1, 2]


def test_prefetch_holds_so_many_and_no_more():
    put, reached = [], threading.Event()

    def record(batch):
        put.append(batch)
        if len(put) == 3:
            reached.set()
        return batch

    with prefetch_to_device(iter(range(100)), record, size=3) as batches:
        assert reached.wait(5)
        time.sleep(0.05)
        assert len(put) == 3
        assert next(batches) == 0


def test_prefetch_measures_the_wait():
    release = threading.Event()

    def gated():
        yield 0
        release.wait(5)
        yield 1

    with prefetch_to_device(gated(), lambda batch: batch) as batches:
        next(batches)
        threading.Timer(0.2, release.set).start()
        next(batches)
        assert batches.wait_seconds >= 0.1


@pytest.mark.parametrize("where", ["iterator", "put"])
def test_prefetch_errors_surface_after_what_was_good(where):
    def numbers():
        yield 1
        yield 2
        if where == "iterator":
            raise UserError("from the iterator")
        yield 3

    def put(number):
        if number == 3:
            raise UserError("from the put")
        return number

    with prefetch_to_device(numbers(), put) as batches:
        assert [next(batches), next(batches)] == [1, 2]
        for _ in range(2):
            with pytest.raises(UserError, match=where):
                next(batches)


def test_closing_or_dropping_a_prefetch_ends_its_thread():
    def threads():
        return [thread for thread in threading.enumerate() if thread.name == "prefetch"]

    batches = prefetch_to_device(iter(range(10**9)), lambda batch: batch)
    next(batches)
    batches.close()
    assert not threads() and list(batches) == []
    batches = prefetch_to_device(iter(range(10**9)), lambda batch: batch)
    assert threads()
    del batches
    assert not threads()


def test_an_interpreter_ends_with_open_pipelines():
    program = """
import numpy as np
from tests.data.test_pipeline import Numbers, draw, open_numbers
from vqgan_jax.data.prefetch import prefetch_to_device
batches = prefetch_to_device(open_numbers(threads=2), lambda batch: batch)
print(next(batches)["index"].shape)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0 and done.stdout == "(8,)\n" and "Traceback" not in done.stderr, done.stderr
