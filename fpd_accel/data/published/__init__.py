"""Datasets published as Parquet: writing, downloading and streaming them."""
