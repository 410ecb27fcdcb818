"""Eight simulated CPU devices for every test; compiling is most of the time, so XLA optimises little."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "0"  # this and the next as in cli.spread_cpu
os.environ["PJRT_NPROC"] = "32"
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# The same program is compiled once for all tests of a run, and of the runs after it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(os.path.dirname(__file__), "..", ".cache", "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

from tests.bucket import bucket, service  # noqa: E402, F401
