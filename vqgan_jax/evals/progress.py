"""A bar with rate and time left around a long pass over pictures, and one line of speed at its end."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from tqdm import tqdm

from vqgan_jax.stopping import breakable


def watched(
    items: Iterable[Any], total: int, what: str, rows: Callable[[Any], int] = lambda item: len(item[0])
) -> Iterator[Any]:
    """Passes items on, as `breakable` does.

    Args:
      items: what stands for some pictures each, such as a tuple of arrays.
      total: pictures over all hosts.
      what: they are, for people.
      rows: how many pictures an item stands for.
    """
    first = jax.process_index() == 0
    share = -(-total // jax.process_count())
    start, count = time.perf_counter(), 0
    with tqdm(total=share, desc=what, unit="img", disable=not (first and sys.stderr.isatty())) as bar:
        for item in breakable(items, at_most=total + 1):
            yield item
            count += rows(item)
            bar.update(rows(item))
    seconds = time.perf_counter() - start
    if first and count:
        rate = count * jax.process_count() / seconds
        print(f"{what}: {total} images in {seconds:.1f} s, {rate:.4g} images/s", flush=True)
