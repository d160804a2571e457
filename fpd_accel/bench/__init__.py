"""Benchmarks of the loader, the training step and the evaluation on this machine."""
