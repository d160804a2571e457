"""``fpd-accel bench <what>``: what the trainer costs on this machine, as a table and as JSON."""
