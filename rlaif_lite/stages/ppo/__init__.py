"""The PPO stage: `step` is the story; the other files are what it calls."""

from .step import NEEDS, READS, run

__all__ = ["NEEDS", "READS", "run"]
