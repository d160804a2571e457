"""Synthetic people: COCO keypoint datasets drawn from a seed."""
