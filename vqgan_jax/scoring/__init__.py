"""Whole scores: what evaluate.py and the trainers' schedule run, built of evals/, trained models and data sets."""
