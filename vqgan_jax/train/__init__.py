"""Training: state, optimizers, the two steps, checkpoints, the loop and the metric writer."""
