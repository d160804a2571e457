"""The recipe: every knob of a run, typed and checked before torch is imported."""
