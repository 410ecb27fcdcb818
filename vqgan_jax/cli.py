"""How every entry point starts: flags whose errors are one line, user errors without a stack trace, several hosts."""

import contextlib
import errno
import logging as std_logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

import jax
from absl import app, flags
from etils import epath
from ml_collections import config_flags

from vqgan_jax import parallel, storage, watchdog, weights
from vqgan_jax.config import UserError
from vqgan_jax.exit_codes import LOST, PREEMPTED, STORAGE, USER_ERROR

flags.disclaim_key_flags()  # they are those of the script that defines them: its --help lists them
JOIN_SECONDS = 270  # that hosts may take to find each other; JAX aborts after 300
_LOST = ("onnection", "UNAVAILABLE", "Gloo", "eartbeat", "DEADLINE_EXCEEDED", "ABORTED")  # in errors of collectives
_STATUS = re.compile("[A-Z_]+: ")  # UNKNOWN: Gloo AllGather failed
_LAST_WORD_SECONDS = 2.0  # in which all hosts that end alike say so; JAX aborts those that outlive host 0
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)  # errors of disks, never bugs
DISTRIBUTED = "VQGAN_JAX_DISTRIBUTED"  # the variable by which launch/ says that several processes form one job


def define_training_flags() -> None:
    """The flags of the two trainers: --config, --workdir and --distributed."""
    config_flags.DEFINE_config_file(
        "config", None, "Config file, with an argument after a colon: configs/demo_vqgan.py:runlocal.", lock_config=True
    )
    flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, logs, pictures. Rerun to resume.")
    define_distributed_flag()


def define_distributed_flag() -> None:
    """--distributed: whether several processes form one job. What launch/ starts is told so by the environment."""
    flags.DEFINE_bool(
        "distributed",
        os.environ.get(DISTRIBUTED) == "1",
        "Several hosts: call jax.distributed.initialize, which finds TPU pods, GKE and Slurm.",
    )


def run(main: Callable[[], None], *, required: Sequence[str]) -> None:
    """Parses flags, sets logging and devices up, and runs `main`; what `exit_code` knows ends it with one line.

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
        except SystemExit:  # absl has printed its help, and would end as if that were a mistake
            sys.exit(0)
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
        if code := exit_code(prepared):
            sys.exit(code)

    def prepared() -> None:
        if "distributed" in flags.FLAGS and flags.FLAGS.distributed:
            with _roll_call():
                join_processes()
        elif "distributed" in flags.FLAGS:
            signal.signal(signal.SIGTERM, leave_when_told)
        if "distributed" in flags.FLAGS:
            keep_compiled_programs()
        with leave_with_others():
            main()

    app.run(guarded, flags_parser=parse)


def exit_code(work: Callable[[], int | None]) -> int:
    """Runs `work` and returns the exit code: its own, or where it ends in what a user should hear of, that kind's code
    of vqgan_jax/exit_codes.py after one printed line."""
    try:
        return work() or 0
    except Exception as error:
        if not (told := _told(error)):
            raise
        code, message = told
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code


def _told(error: Exception) -> tuple[int, str] | None:
    """(exit code, line) of an error that a user should hear of; None of a bug."""
    if isinstance(error, UserError):
        return USER_ERROR, str(error)
    if isinstance(error, storage.StorageError):
        return STORAGE, str(error)
    if isinstance(error, jax.errors.JaxRuntimeError) and parallel.exceeds_memory(error):
        reason = " ".join(str(error).split())[:300]
        less = "fewer pictures at once (--batch, config.batch_size), config.remat or a larger config.mesh.fsdp"
        return USER_ERROR, f"a device's memory is too small; {less} takes less ({reason})"
    code, reason = STORAGE if storage.may_pass(error) else USER_ERROR, " ".join(str(error).split()) or repr(error)
    if storage.is_bucket_error(error):
        return code, f"gs://: the bucket does not answer as it should ({reason})"
    if isinstance(error, OSError) and error.errno in _DISK:
        return code, f"the disk does not take or give what it should ({reason})"
    return None


def leave_when_told(number: int, frame: FrameType | None) -> None:
    """Handles SIGTERM of one process before and after its loop, when there is nothing to save. Several processes have
    JAX's preemption service instead, whose request the loop finds when it begins."""
    sys.exit(PREEMPTED)


@contextlib.contextmanager
def leave_with_others() -> Iterator[None]:
    """Ends this process at once where what it shares with other hosts broke, which is how one that died shows: JAX
    would wait for it once more on the way out. So does one that ends in what a user should hear of: the others, which
    may wait for it in a collective, notice."""
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        if lost := _of_other_hosts(error):
            place, reason = f"host {jax.process_index()} of {jax.process_count()}", " ".join(str(lost).split())[:300]
            again = "start the job again to go on from the last checkpoint"
            told = LOST, f"{place} leaves, for it lost another one ({reason}); {again}"
        elif not (told := _told(error)):
            raise
        code, message = told
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        if not lost:
            time.sleep(_LAST_WORD_SECONDS)
        os._exit(code)


def _of_other_hosts(error: BaseException | None) -> BaseException | None:
    """What JAX said of a host that is gone, where that is behind an error: Orbax makes others of it, and what breaks
    while a program is dispatched comes as a ValueError that begins with its status."""
    while error is not None:
        said = str(error)
        at_dispatch = isinstance(error, ValueError) and _STATUS.match(said)
        by_jax = at_dispatch or isinstance(error, jax.errors.JaxRuntimeError)
        if by_jax and any(sign in said for sign in _LOST):
            return error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


@contextlib.contextmanager
def _roll_call() -> Iterator[None]:
    """Names the hosts that have not come, a little before JAX gives up without a name; where the launcher says which
    host this is, and there is a --workdir to meet in."""
    place, workdir = watchdog.place_in_job(), flags.FLAGS.workdir if "workdir" in flags.FLAGS else None
    if not (place and workdir):
        yield
        return
    with watchdog.Watchdog(storage.path(workdir) / watchdog.FOLDER, *place, JOIN_SECONDS) as dog:
        dog.beat(0, "waiting for all hosts to join")
        yield


def join_processes() -> None:
    """`jax.distributed.initialize`: told how many processes there are by the environment, as launch/local.sh does, or
    finding it out on a TPU pod, GKE or Slurm. Raises UserError where there is neither."""
    if place := watchdog.place_by(watchdog.LOCAL):  # the address JAX reads from JAX_COORDINATOR_ADDRESS by itself
        index, count = place
        jax.distributed.initialize(num_processes=count, process_id=index, cluster_detection_method="deactivate")
        return
    try:
        jax.distributed.initialize()
    except ValueError as error:
        raise UserError(f"--distributed: found no cluster ({error}); start here with launch/local.sh") from None


def keep_compiled_programs() -> None:
    """Compiles a program once for all runs: in $JAX_COMPILATION_CACHE_DIR (gs:// too, one for all hosts), else beside
    the downloaded weights. On a CPU only in the former, for what one CPU compiled may crash another."""
    if not jax.config.jax_compilation_cache_dir and jax.default_backend() != "cpu":
        jax.config.update("jax_compilation_cache_dir", str(weights.cache_folder() / "compiled"))


def spread_cpu() -> None:
    """Keeps several simulated CPU devices from waiting for each other's collectives for ever: programs run one at a
    time, in a pool of threads that holds every collective that can wait at once. Call it before the first device use.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if (devices := jax.config.jax_num_cpu_devices) > 1:
        os.environ.setdefault("PJRT_NPROC", str(max(os.cpu_count() or 1, 4 * devices)))


def fail(message: str) -> None:
    """Prints one line and exits as a user's error does."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(USER_ERROR)


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
