"""Training: configuration, loop, step, evaluation, checkpoints."""
