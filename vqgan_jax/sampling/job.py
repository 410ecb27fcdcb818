"""A folder of samples that a job fills by index: it may be killed at any time, and goes on where it was.

Pictures are PNGs named by index; sampling.json says how they were made, so that no other settings mix in.
"""

import io
import json
import re
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from PIL import Image

from vqgan_jax import images, storage
from vqgan_jax.config import UserError, differences

RECORD, ARRAYS, SHEET = "sampling.json", "samples.npz", "grid.png"
THREADS = 8
_WAITING, _WAITING_BYTES = 512, 1 << 30  # pictures in memory at most, while the threads compress


class SampleFolder:
    """The pictures of one job, written on threads. A context manager: leaving it waits for what is being written.

    Attributes:
      done: indices of the pictures that stood there before.
    """

    def __init__(self, folder: epath.Path, settings: Mapping[str, Any]):
        """Opens the folder, and records the settings in it if it holds no pictures yet. Called by all hosts together.

        Args:
          folder: exists.
          settings: plain data; what the pictures depend on.

        Raises:
          UserError: it holds pictures of other settings.
        """
        self._folder = folder
        record, names = folder / RECORD, [file.name for file in storage.files(folder)]  # a bucket knows no folder
        self.done = {int(name[:-4]) for name in names if re.fullmatch(r"\d{6,}\.png", name)}
        recorded = json.loads(record.read_text()) if record.exists() else {}
        found = differences(settings, recorded)
        others = bool(found and recorded and self.done)
        if multihost_utils.process_allgather(np.array(others)).any():  # before any host writes
            raise UserError(f"--out={folder}: holds samples of other settings: {'; '.join(found)}. Name another")
        if found:  # pictures without a record are nobody's
            self.done = set()
        if jax.process_index() == 0:
            for name in names:  # what a killed process was writing
                if re.fullmatch(r"\.\d+\.tmp\..*", name):
                    (folder / name).unlink(missing_ok=True)
            if found:
                storage.write_json(record, settings)
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

    def write(self, index: int, picture: np.ndarray) -> None:
        """Writes one uint8 picture in the background, whole or not at all; waits where too many are waiting."""
        self._writing.append(self._threads.submit(images.save_png, self.path(index), picture))
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
