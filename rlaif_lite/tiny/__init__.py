"""The embedded bases: a tiny genuine video language model, its pretraining, and the shipped checkpoints.

`base/` is the default; `base_weak/` reads clips well and whole videos badly.
"""
