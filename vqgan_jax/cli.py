"""How every entry point starts: flags whose errors are one line, user errors without a stack trace, several hosts."""

import logging as std_logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import app, flags
from etils import epath
from ml_collections import config_flags

from vqgan_jax import storage
from vqgan_jax.config import UserError

FAILED = 2  # the exit code of every user error


def define_training_flags() -> None:
    """The flags of the two trainers: --config, --workdir and --distributed."""
    config_flags.DEFINE_config_file(
        "config", None, "Config file, with an argument after a colon: configs/demo_vqgan.py:runlocal.", lock_config=True
    )
    flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, logs, pictures. Rerun to resume.")
    define_distributed_flag()


def define_distributed_flag() -> None:
    """--distributed: whether several processes form one job."""
    flags.DEFINE_bool(
        "distributed", False, "Several hosts: call jax.distributed.initialize, which finds TPU pods, GKE and Slurm."
    )


def run(main: Callable[[], None], *, required: Sequence[str]) -> None:
    """Parses flags, sets logging and devices up, and runs `main`; a UserError ends it with one line and exit code 2.

    Args:
      main: takes nothing; reads FLAGS.
      required: flags that must be given.
    """

    def parse(argv: Sequence[str]) -> list[str]:
        for arg in argv:  # ml_collections would say so later, in many lines
            path = arg.partition("=")[2].partition(":")[0]
            if arg.lstrip("-").startswith("config=") and not Path(path).is_file():
                fail(f"--config={path}: no such file")
        try:
            rest = flags.FLAGS(argv)
        except flags.Error as error:
            fail(str(error).replace("\n", " "))
        except (AttributeError, KeyError, IndexError, TypeError, ValueError, OSError, UserError) as error:
            fail(_config_error(error))
        if len(rest) > 1:
            fail(f"'{rest[1]}' is no flag; flags begin with --")
        for name in required:
            if not flags.FLAGS[name].value and not (flags.FLAGS.is_parsed() and _asks_for_help()):
                fail(f"--{name} is missing; --help lists all flags")
        return rest

    def guarded(_: Sequence[str]) -> None:
        spread_cpu()
        for name in ("orbax", "jax", "absl"):
            std_logging.getLogger(name).setLevel(std_logging.WARNING)
        try:
            if "distributed" in flags.FLAGS and flags.FLAGS.distributed:
                jax.distributed.initialize()
            main()
        except UserError as error:
            fail(str(error))
        except Exception as error:
            if not storage.is_bucket_error(error):
                raise
            fail(f"gs://: the bucket does not answer as it should ({' '.join(str(error).split()) or repr(error)})")

    app.run(guarded, flags_parser=parse)


def spread_cpu() -> None:
    """Keeps several simulated CPU devices from waiting for each other's collectives for ever: programs run one at a
    time, in a pool of threads that holds every collective that can wait at once. Call it before the first device use.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if (devices := jax.config.jax_num_cpu_devices) > 1:
        os.environ.setdefault("PJRT_NPROC", str(max(os.cpu_count() or 1, 4 * devices)))


def fail(message: str) -> None:
    """Prints one line and exits with code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(FAILED)


def check_workdir(workdir: str, flag: str = "--workdir") -> epath.Path:
    """Makes the folder that `flag` names. Raises UserError where it cannot be written."""
    return storage.make_folder(workdir, f"{flag}={workdir}")


def _asks_for_help() -> bool:
    return any(arg.lstrip("-").startswith("help") for arg in sys.argv[1:])


def _config_error(error: Exception) -> str:
    """One line out of what ml_collections or a config file raised: an unknown key names the one that was meant."""
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    name = text.strip("'\"")
    for flag in (arg.split("=")[0] for arg in sys.argv[1:] if arg.startswith("--config.")):
        if flag.rsplit(".", 1)[-1] == name:  # ml_collections says no more than the key's last part
            return f"{flag}: unknown key '{name}'; configs/common.py lists all"
    if isinstance(error, UserError):
        return text
    if isinstance(error, OSError) and error.filename:
        return f"--config={error.filename}: {error.strerror.lower()}"
    return f"--config: {text}"
