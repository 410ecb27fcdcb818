"""Finds the parts of a published data set under one root, unpacked or still in the archives it is downloaded in."""

import posixpath
from collections.abc import Iterable, Mapping, Sequence

from absl import logging

from vqgan_jax import storage
from vqgan_jax.config import UserError
from vqgan_jax.data.decoding import IMAGE_SUFFIXES
from vqgan_jax.data.source import CorruptExample
from vqgan_jax.data.stores import Store, open_store


def find_store(root: str, candidates: Sequence[str], layout: str, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> Store:
    """The first of some folders (of a folder or an archive) that is there.

    Args:
      root: what `config.data.path` names.
      candidates: relative paths, such as "train2017" and "train2017.zip/train2017"; "" is the root itself.
      layout: what belongs under the root, for the error.
      suffixes: of the files to list.

    Raises:
      UserError: none of them is there, or one cannot be read in place.
    """
    if not root:
        raise UserError(f"config.data.path: name what holds {layout}")
    for candidate in candidates:
        try:
            store = open_store(posixpath.join(root, candidate), suffixes)
        except UserError:
            if storage.path(posixpath.join(root, candidate)).exists():
                raise
        else:
            if len(store.names):
                return store
    raise UserError(
        f"config.data.path: '{root}' holds no files in {' or '.join(map(repr, candidates))}; {layout} belong"
    )


def find_file(root: str, candidates: Sequence[str], layout: str) -> tuple[bytes, str]:
    """The bytes of the first of some files (of a folder or an archive) that is there, and where it is.

    Raises:
      UserError: none of them is there; otherwise as `find_store`.
    """
    found = read_optional(root, candidates)
    if found is None:
        raise UserError(f"config.data.path: '{root}' lacks {' and '.join(map(repr, candidates))}; {layout} belong")
    return found


def read_optional(root: str, candidates: Sequence[str]) -> tuple[bytes, str] | None:
    """As `find_file`; None where none is there."""
    for candidate in candidates:
        where = posixpath.join(root, candidate)
        path = storage.path(where)
        if path.is_file():
            return path.read_bytes(), where
        if any(above.suffix.lower() in (".zip", ".tar") and above.is_file() for above in path.parents):
            folder, _, name = where.rpartition("/")
            try:
                return open_store(folder).read(name), where
            except (UserError, CorruptExample):
                continue
    return None


def stem(name: str) -> str:
    """A relative name without its suffix: how pictures and what describes them are matched."""
    return posixpath.splitext(name)[0]


def matched(images: Sequence[str], described: Mapping[str, Iterable[str]], layout: str) -> list[tuple[str, ...]]:
    """Rows of names that agree but for their suffix: a picture's, and those of what belongs to it.

    Files without their counterpart are left out and warned of.

    Args:
      images: names of pictures; the rows keep their order.
      described: the other names by what they are, such as {"mask": ...}.
      layout: what belongs under the root, for the error.

    Raises:
      UserError: no name agrees.
    """
    found = {what: {stem(name): name for name in names} for what, names in described.items()}
    rows = [name for name in images if all(stem(name) in by_stem for by_stem in found.values())]
    if not rows:
        example = f", such as '{images[0]}'," if images else ""
        raise UserError(
            f"config.data.path: none of {len(images)} images{example} has a {' and a '.join(found)} of its name; "
            f"{layout} belong"
        )
    stems = {stem(name) for name in images}
    for what, by_stem in found.items():
        warn_left_out([name for name in images if stem(name) not in by_stem], f"have no {what}")
        warn_left_out([name for key, name in by_stem.items() if key not in stems], f"are a {what} without its image")
    return [(name, *(by_stem[stem(name)] for by_stem in found.values())) for name in rows]


def warn_left_out(names: Sequence[str], why: str) -> None:
    """Says in one line how many files are left out."""
    if names:
        logging.warning("config.data.path: %d files %s, such as '%s': left out", len(names), why, names[0])
