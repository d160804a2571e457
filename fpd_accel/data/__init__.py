"""Datasets: annotation files are prepared as shards, and streams read batches from shards."""
