"""Scores: pixel metrics, code statistics and the runners that score a data set."""
