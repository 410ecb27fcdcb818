"""Eight simulated CPU devices for every test; compiling is most of the time, so XLA optimises little."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "0"  # this and the next as in cli.spread_cpu
os.environ["PJRT_NPROC"] = "64"
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
