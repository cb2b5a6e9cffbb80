"""i-SRT's context (arXiv 2406.11280): the policy describes a video while it reads its own last description of it, and
judges its answers with what it wrote. Round after round the description is one of the policy's, not of the SFT model's.

Decoding is greedy, so that a description is a function of the policy and of what it wrote before (published: not said).
"""

from typing import Sequence

from ..data.records import Message
from ..model.inputs import VIDEO_MARK, decode_answer, encode_prompt
from ..model.roles import ActiveRole
from ..recipe import Describe
from ..rollout import Sampling, sample
from ..video.cache import FeatureRecord


def describe(
    role: ActiveRole, videos: Sequence[FeatureRecord], before: Sequence[str | None], section: Describe
) -> list[str]:
    """A description of every video, written while reading `before`; None there asks for a plain one."""
    base = role.roles.base
    rows = []
    for video, text in zip(videos, before, strict=True):
        content = section.prompt if text is None else section.again.format(context=text)
        mark = "" if VIDEO_MARK in content else f"{VIDEO_MARK}\n"
        rows.append(encode_prompt(base, [Message("user", mark + content)], video))
    sampling = Sampling(section.max_new_tokens, temperature=0.0)
    found = sample(role, rows, sampling, seeds=[0] * len(rows), batch_size=section.batch_size)
    return [decode_answer(base, trajectory.ids) for trajectory in found]
