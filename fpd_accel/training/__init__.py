"""Training: the loop, the objective, the networks, checkpoints and resuming."""
