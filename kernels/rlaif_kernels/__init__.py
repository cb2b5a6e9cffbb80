"""Loss-side and video-side kernels of RLHF on one GPU, with torch and triton as the only dependencies.

    linear_logprob        log-prob, logsumexp, entropy and exact KL of a frozen LM head, without its logits
    sft_loss              cross-entropy through the same head, loss and gradient in one pass
    ppo_policy_loss       clipped PPO loss with entropy bonus and k3 or exact KL penalty, likewise
    gae                   advantages and returns of a padded batch in one launch
    frame_dissimilarity   how much each video token changed since the frame before, in float32
    select_and_gather     the k best tokens, their positions and frames, in one launch
    frozen_head           weight and bias of an output layer, or the reason why these functions cannot take it

Each has a plain reference (`reference.py`), a torch path that runs anywhere and a Triton path for NVIDIA GPUs.
"""

from .frames import Selected, frame_dissimilarity, select_and_gather
from .gae import gae
from .linear_logprob import LinearLogprob, frozen_head, linear_logprob
from .losses import PpoStats, SftStats, ppo_policy_loss, sft_loss

__all__ = [
    "LinearLogprob",
    "PpoStats",
    "Selected",
    "SftStats",
    "frame_dissimilarity",
    "frozen_head",
    "gae",
    "linear_logprob",
    "ppo_policy_loss",
    "select_and_gather",
    "sft_loss",
]
