"""i-SRT's context (arXiv 2406.11280): round after round the policy describes a video anew while it reads its own last
description, and judges its answers with what it wrote. The first description is the narrative of the context stage.

A description is made clip by clip and joined as the narrative is (`features.clips: 1`: of the whole video at once, as
published). Decoding is greedy, so that it is a function of the policy and of what it wrote before.
"""

from collections.abc import Sequence

from ..data.records import VIDEO_MARK, Message
from ..model.inputs import encode_prompt
from ..model.roles import ActiveRole
from ..recipe import Context, Describe
from ..rollout import greedy_texts
from ..video.cache import FeatureRecord
from .narrative import narrative, spans_of


def describe_again(
    role: ActiveRole,
    videos: Sequence[Sequence[FeatureRecord]],
    before: Sequence[str],
    section: Describe,
    context: Context,
) -> list[str]:
    """A description of every video, given as its clips in order, by a role that reads `before` at each clip."""
    base, rows = role.roles.base, []
    for clips, text in zip(videos, before, strict=True):
        content = section.prompt.format(context=text)
        mark = "" if VIDEO_MARK in content else f"{VIDEO_MARK}\n"
        rows += [encode_prompt(base, [Message("user", mark + content)], clip) for clip in clips]
    captions = iter(greedy_texts(role, rows, context.max_new_tokens, context.batch_size))
    return [narrative([next(captions) for _ in clips], context.markers, spans_of(clips)) for clips in videos]
