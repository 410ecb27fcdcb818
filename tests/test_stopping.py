"""Breaking off between batches: on several hosts all in the same loop, however many batches each has."""

import itertools
import os
import signal

import jax
import pytest
from jax.experimental import multihost_utils

from vqgan_jax import stopping
from vqgan_jax.evals.progress import watched
from vqgan_jax.evals.runner import _collect
from vqgan_jax.parallel import make_mesh
from vqgan_jax.stopping import BrokenOff, StopRequest, breakable

MOST = 6


def host(monkeypatch, items: int, point: int) -> tuple[list[str], int]:
    """What one of two hosts does in two evaluations and the step between, where JAX lets all stop at `point`; and the
    point that comes next."""
    points = itertools.count(1)
    monkeypatch.setattr(stopping, "_points", points)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda at: at == point)
    done, stop = [], StopRequest()
    for name in ("first", "second"):
        try:
            with stop.breaking():
                for _ in breakable(range(items), at_most=MOST):
                    pass
                done.append(name)
        except BrokenOff:
            done.append(f"{name} broken off")
        if stop.requested():
            done.append("left")
            break
    return done, next(points)


@pytest.mark.parametrize("point", range(1, 2 * MOST + 4))
def test_hosts_break_off_alike_whatever_their_numbers_of_batches(monkeypatch, point):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    told = [host(monkeypatch, items, point) for items in (0, 2, 3, MOST)]
    assert all(one == told[0] for one in told), told
    assert (told[0][0][-1] == "left") == (point <= 2 * (MOST + 1))


def test_nothing_is_broken_off_but_within_a_training_that_was_told_to_go():
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested() and list(breakable(range(3))) == [0, 1, 2]
        for loop in (
            lambda: list(breakable(range(3))),
            lambda: list(watched(([k] for k in range(3)), 3, "pictures")),
            lambda: _collect(lambda rows: pytest.fail("a batch was run"), [{}], mesh, 8),
        ):
            with pytest.raises(BrokenOff), stop.breaking():
                loop()
    assert list(breakable(range(3))) == [0, 1, 2]
