"""Weights files: reading, converting and recognising them; and model folders."""
