"""Sampling answers from a role: prompts prefilled once, answers decoded in slots that are refilled as they finish.

`sample` is the way in. What an answer says depends on the role, its prompt and its seed, up to rounding: every answer
draws from its own stream of uniform numbers, so neither the number of slots nor the order in which they are filled
matters. The sampler's own log-probs are returned for comparison only: PPO recomputes the old log-probs with the scoring
forward, because a cached decode and a full forward round differently.

Departure from the release (and from TRL): no call of transformers' `generate`, which holds a batch until its longest
answer ends and keeps the padding of the shorter prompts in the cache.
"""

from .loop import greedy_texts, sample, sample_together
from .sampling import Sampling, Trajectory, draw
from .slots import slot_bytes, slot_length

__all__ = ["Sampling", "Trajectory", "draw", "greedy_texts", "sample", "sample_together", "slot_bytes", "slot_length"]
