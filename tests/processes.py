"""Processes that a test starts and that meet on the loopback interface."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def free_address() -> str:
    """HOST:PORT on which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def run_together(
    arguments: Sequence[Sequence[str]], settings: Mapping[str, str], *, timeout: float
) -> list[subprocess.CompletedProcess]:
    """Runs `python ARGUMENTS` of every process at once from the repository's root, and waits for all."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | settings
    options: Any = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    started = [subprocess.Popen([sys.executable, *argv], **options) for argv in arguments]
    ended = [process.communicate(timeout=timeout) for process in started]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *said)
        for process, said in zip(started, ended, strict=True)
    ]


def results_of(ended: Sequence[subprocess.CompletedProcess]) -> list[Any]:
    """What each process printed behind RESULT, as JSON; all of them must have ended well."""
    for process in ended:
        assert process.returncode == 0, process.stderr[-3000:]
    lines = [next(line for line in process.stdout.splitlines() if line.startswith("RESULT")) for process in ended]
    return [json.loads(line[7:]) for line in lines]
