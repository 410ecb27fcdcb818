"""Flax Linen modules and their frozen hyper-parameter dataclasses; arrays in, arrays out."""
