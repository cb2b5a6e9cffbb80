"""The embedded base: a tiny genuine video language model, its pretraining, and the shipped checkpoint in `base/`."""
