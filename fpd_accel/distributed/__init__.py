"""Processes, signals and folders that several machines share; independent of data and training."""
