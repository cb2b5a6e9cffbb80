"""The narrative: the SFT model describes consecutive clips of each preference video, and the captions are joined in
time. Where the reward model reads the narrative too (`reward.context`), the RL videos have one as well.

Published: at most 20 frames a clip, 3 clips the best setting, "Describe this video in detail" (VLM-RLAIF section
3.2). Decoding is greedy, so the narrative is a function of the adapter alone. Each video is described once, however
many prompts it has.
"""

from ..data.sentences import says_something
from ..files import by_batches, even_chunks, write_json
from ..judge.narrative import captions_of, narrative, spans_of
from ..progress import progress, say
from ..workspace import Workspace

READS = ("seed", "context", "features.clips", "features.clip_frames", "data.preference", "data.pairs")
NEEDS = ("data", "features", "sft")


def run(work: Workspace) -> dict:
    """Write `context/narratives.json`: {video: narrative}, and `context/captions.jsonl` with the captions of each
    clip."""
    recipe = work.recipe
    section = recipe.context
    if not work.recipe.narrated:  # nothing is judged, and the reward role reads no narrative
        write_json(work.stage("context") / "narratives.json", {})
        return {"videos": 0}
    work.load_role("sft")
    narrated = [record for split in work.recipe.narrated for record in work.records(split)]
    records = {work.name_of(record): record for record in narrated if record.video is not None}
    names = [f"clip{i}" for i in range(recipe.features.clips)]

    def caption(batch: list[str]) -> list[dict]:
        videos = [[views[name] for name in names] for views in (work.views(records[key]) for key in batch)]
        with work.roles.use("sft") as judge:
            captions = captions_of(judge, videos, [section.prompt] * len(videos), section)
        return [
            {"video": key, "captions": said, "spans": spans_of(clips)}
            for key, said, clips in zip(batch, captions, videos, strict=True)
        ]

    batches = even_chunks(list(records), section.batch_size // recipe.features.clips)
    with progress(len(records), "context", unit="video") as bar:
        rows = by_batches(work.stage("context") / "captions.jsonl", batches, caption, bar.advance)
    narratives = {row["video"]: narrative(row["captions"], section.markers, row["spans"]) for row in rows}
    write_json(work.stage("context") / "narratives.json", narratives)
    words = [len(text.split()) for text in narratives.values()]
    empty = sum(not says_something(caption) for row in rows for caption in row["captions"])
    if empty:
        say(f"context: {empty} of {len(rows) * recipe.features.clips} captions have no word and are left out")
    return {
        "videos": len(narratives),
        "clips": recipe.features.clips,
        "empty_captions": empty,
        "mean_words": sum(words) / max(1, len(words)),
    }
