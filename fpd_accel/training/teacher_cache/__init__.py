"""The teacher's outputs for fixed views of each person, computed once before training."""
