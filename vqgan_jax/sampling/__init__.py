"""Sampling: strategies, the cached decoder and the sliding window. Handed functions, not models."""
