"""VQGAN and autoregressive transformer ("Taming Transformers", arXiv 2012.09841) in JAX and Flax."""

__version__ = "0.1.0"
