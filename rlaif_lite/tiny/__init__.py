"""The embedded base: a tiny genuine video language model, how it is pretrained, and the shipped checkpoint in `base/`."""
