"""A folder of samples that a job fills by index: it may be killed at any time, and goes on where it was.

Pictures are PNGs named by index; sampling.json says how they were made, so that no other settings mix in. Of pictures
that take long the codes drawn so far are kept beside them.
"""

import io
import json
import re
import time
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from PIL import Image

from vqgan_jax import images, storage
from vqgan_jax.config import UserError, differences

RECORD, ARRAYS, SHEET, GROWING = "sampling.json", "samples.npz", "grid.png", "growing"
THREADS = 8
KEEP_SECONDS = 20.0  # between two times that codes are kept
_WAITING, _WAITING_BYTES = 512, 1 << 30  # pictures in memory at most, while the threads compress


class SampleFolder:
    """The pictures of one job, written on threads. A context manager: leaving it waits for what is being written.

    Attributes:
      done: indices of the pictures that stood there before.
    """

    def __init__(self, folder: epath.Path, settings: Mapping[str, Any], later: Sequence[str] = ()):
        """Opens the folder, and records the settings in it if it holds no pictures yet. Called by all hosts together.

        Args:
          folder: exists.
          settings: plain data; what the pictures depend on.
          later: those that may still change until a first picture is whole, such as how codes are decoded.

        Raises:
          UserError: it holds pictures of other settings.
        """
        self._folder = folder
        record, names = folder / RECORD, [file.name for file in storage.files(folder)]  # a bucket knows no folder
        self.done = {int(name[:-4]) for name in names if re.fullmatch(r"\d{6,}\.png", name)}
        recorded = json.loads(record.read_text()) if record.exists() else {}
        free = () if self.done else later
        found = differences(*({k: x for k, x in told.items() if k not in free} for told in (settings, recorded)))
        self._begun = {int(name.partition(".")[0]) for name in names if re.fullmatch(r"\d{6,}\.begun\.npz", name)}
        others = bool(found and recorded and self.done | self._begun)
        if multihost_utils.process_allgather(np.array(others)).any():  # before any host writes
            raise UserError(f"--out={folder}: holds samples of other settings: {'; '.join(found)}. Name another")
        if found:  # pictures without a record are nobody's
            self.done = set()
        if jax.process_index() == 0:
            for index in self._begun if found else self._begun & self.done:
                self._begun_path(index).unlink(missing_ok=True)
            for name in names:  # what a killed process was writing
                if re.fullmatch(r"\.\d+\.tmp\..*", name):
                    (folder / name).unlink(missing_ok=True)
            if settings != recorded:
                storage.write_json(record, settings)
        self._begun = set() if found else self._begun - self.done
        self._kept = time.monotonic()
        multihost_utils.sync_global_devices("the folder of samples is open")

    def __enter__(self) -> "SampleFolder":
        self._threads = ThreadPoolExecutor(THREADS)
        self._writing: deque[Future] = deque()
        return self

    def __exit__(self, *error: Any) -> None:
        self._threads.shutdown(cancel_futures=error[0] is not None)
        if error[0] is None:
            while self._writing:
                self._writing.popleft().result()

    def path(self, index: int) -> epath.Path:
        """The file of a picture."""
        return self._folder / f"{index:06d}.png"

    def _begun_path(self, index: int) -> epath.Path:
        return self._folder / f"{index:06d}.begun.npz"

    def keep(self, indices: Iterable[int], ids: jax.Array, position: int) -> None:
        """Saves the codes int32 [n, h, w] that pictures have at a position of their sampler, if it is time for that."""
        if time.monotonic() - self._kept < KEEP_SECONDS:
            return
        for index, codes in zip(indices, np.asarray(ids), strict=False):  # rows that fill a batch up have no index
            storage.save_npz(self._begun_path(index), ids=codes, position=position)
            self._begun.add(int(index))
        self._kept = time.monotonic()

    def begun(self, indices: Iterable[int]) -> tuple[np.ndarray, int] | None:
        """What a job that was stopped had drawn: codes int32 [n, h, w], and the position that all have reached; None
        where one of them had not begun, or what was kept is damaged."""
        if not set(indices) <= self._begun:
            return None
        try:
            kept = [storage.load_npz(self._begun_path(index)) for index in indices]
            return np.stack([x["ids"] for x in kept]), min(int(x["position"]) for x in kept)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return None

    def show(self, indices: Iterable[int], pictures: Iterable[np.ndarray], rows: int) -> None:
        """Writes unfinished uint8 pictures [h, w, c], of which so many rows of codes are drawn."""
        for index, picture in zip(indices, pictures, strict=False):
            images.save_png(self._folder / GROWING / f"{index:06d}_{rows:04d}.png", picture)

    def _finish(self, index: int, picture: np.ndarray) -> None:
        images.save_png(self.path(index), picture)
        if index in self._begun:
            self._begun_path(index).unlink(missing_ok=True)

    def write(self, index: int, picture: np.ndarray) -> None:
        """Writes one uint8 picture in the background, whole or not at all; waits where too many are waiting."""
        self._writing.append(self._threads.submit(self._finish, index, picture))
        while len(self._writing) > min(_WAITING, max(THREADS, _WAITING_BYTES // picture.nbytes)):
            self._writing.popleft().result()

    def read(self, indices: Iterable[int]) -> Iterator[np.ndarray]:
        """Written pictures in this order, uint8 [h, w, c], few in memory at a time."""
        indices = [int(index) for index in indices]
        with ThreadPoolExecutor(THREADS) as threads:
            for start in range(0, len(indices), THREADS):
                yield from threads.map(self._read, indices[start : start + THREADS])

    def write_arrays(self, number: int, **arrays: np.ndarray) -> None:
        """Writes samples.npz: `arr_0` uint8 [number, h, w, c], read back picture by picture, and other arrays."""
        with storage.staged(self._folder / ARRAYS) as partial, zipfile.ZipFile(partial, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                for index, picture in enumerate(self.read(range(number))):
                    if index == 0:
                        shape = (number, *picture.shape)
                        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(member, header)
                    if picture.shape != shape[1:]:
                        raise UserError(f"{self.path(index)}: is of another size than its neighbours; delete it")
                    member.write(picture.tobytes())
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, np.asarray(array))

    def _read(self, index: int) -> np.ndarray:
        path = self.path(index)
        try:
            picture = np.asarray(Image.open(io.BytesIO(path.read_bytes())))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error}); delete it and start again") from None
        return picture.reshape(*picture.shape[:2], -1)


def host_share(number: int, process: int, processes: int) -> np.ndarray:
    """The indices that one of several processes makes: ranges that differ by one in length at most."""
    return np.array_split(np.arange(number), processes)[process]
