"""rlaif-lite: align a video language model by its own feedback, on one GPU."""

__version__ = "0.1.0"
