"""The DPO stage: `rounds` is the story; `judges` scores the answers of a round."""

from .rounds import NEEDS, READS, run

__all__ = ["NEEDS", "READS", "run"]
