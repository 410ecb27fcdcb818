#!/usr/bin/env python3
"""Sweeps of a config, run here, on GKE, on TPU VMs or by Slurm: --help says how, vqgan_jax/tools/sweep.py does it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vqgan_jax.tools.sweep import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
