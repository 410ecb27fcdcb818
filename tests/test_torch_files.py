"""The reader of PyTorch files: every kind of tensor in both formats, nothing run, one line for every lie."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from vqgan_jax.config import UserError
from vqgan_jax.torch_files import open_tensors

GOLDEN = Path(__file__).parent / "golden"


class Call:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.reduction = (function, arguments)

    def __reduce__(self):
        return self.reduction


def named(name: str, protocol: int = 2) -> type:
    """A class that pickles as the global `name`, which need not exist."""
    module, _, attribute = name.rpartition(".")
    return type(attribute, (), {"__module__": module, "__qualname__": attribute})


class Pickler(pickle._Pickler):
    """Writes globals by name without looking them up, and tuples that start with "storage" as persistent ids."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_global(self, obj, name=None):
        self.write(f"c{obj.__module__}\n{obj.__qualname__}\n".encode())
        self.memoize(obj)

    dispatch[type] = save_global

    def persistent_id(self, obj):
        return obj if isinstance(obj, tuple) and obj[:1] == ("storage",) else None

    def save_pers(self, pid):
        parts = list(pid)
        self.write(b"(")
        for part in parts:
            self.save(part)
        self.write(b"tQ")


def pickled(value) -> bytes:
    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump(value)
    return stream.getvalue()


def storage(key="0", count=4, kind="torch.FloatStorage") -> tuple:
    return ("storage", named(kind), key, "cpu", count)


class Reduced:
    """Pickles as REDUCE of a global that need not exist."""

    def __init__(self, name, *arguments):
        self.call = (named(name), arguments)

    def __reduce__(self):
        return self.call


def reduced(name: str, *arguments) -> Call:
    return Call(named(name), *arguments)
