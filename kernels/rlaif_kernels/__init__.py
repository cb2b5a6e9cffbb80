"""Loss-side and video-side kernels of RLHF on one GPU, with torch and triton as the only dependencies.

    linear_logprob        log-prob, logsumexp, entropy and exact KL of a frozen LM head, without its logits
    gae                   advantages and returns of a padded batch in one launch
    frame_dissimilarity   how much each video token changed since the frame before, in float32
    select_and_gather     the k best tokens, their positions and frames, in one launch
    frozen_head           weight and bias of an output layer, or the reason why these functions cannot take it

Each has a plain reference (`reference.py`), a torch path that runs anywhere and a Triton path for NVIDIA GPUs.
"""

from .frames import Selected, frame_dissimilarity, select_and_gather
from .gae import gae
from .linear_logprob import LinearLogprob, frozen_head, linear_logprob

__all__ = [
    "LinearLogprob",
    "Selected",
    "frame_dissimilarity",
    "frozen_head",
    "gae",
    "linear_logprob",
    "select_and_gather",
]
