"""Training: state, objective, step, loop, checkpoints, evaluation, metrics."""
