"""The published loader, step and evaluation, rewritten from their behaviour to compare ours with."""
