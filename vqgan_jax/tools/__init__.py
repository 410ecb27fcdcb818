"""Command-line tools: `python -m vqgan_jax.tools.NAME`."""
