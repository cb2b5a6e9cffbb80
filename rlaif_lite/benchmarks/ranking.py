"""Text-to-video retrieval and action recognition by the likelihood of texts, for a model that only writes.

VLM-RLAIF reports both (MSVD and MSR-VTT; UCF101 and HMDB51); its protocol is not known and no code was released. Here
a text's score for a video is the mean log-probability of its tokens, its end included, as the model's answer to one
fixed request about the video. Recognition compares different texts about one video, so what the model would say of
any video is subtracted: the same score without the video. Retrieval compares one text across videos, where length and
that prior are the same for all and so change no rank. Ties count against the model.

Files, as their authors ship them:

    MSR-VTT     MSRVTT_JSFUSION_test.csv (key, vid_key, video_id, sentence), or test_videodatainfo.json, the `sentences`
                of {video_id, caption}, of which --limit takes the first
    MSVD        lines `name caption` (AllVideoDescriptions.txt), or the corpus as CSV (VideoID, Start, End, Language,
                Description), English only; and a list of names, one per line (test_list.txt), where only these count
    UCF101      testlist01.txt (lines Class/name.avi) and classInd.txt (lines `1 Class`) where you have it
    HMDB51      <class>_test_split1.txt, all of them: lines `name.avi 2`, where 2 is a test video
"""

import re
from collections.abc import Sequence as Seq
from pathlib import Path

import torch

from ..errors import DataError
from ..model.answers import Group
from ..model.inputs import Sequence
from ..model.roles import ActiveRole
from ..rollout.score import answer_logps
from .items import Item, Tally, csv_rows, entries, lines_of

CAPTIONS = "MSR-VTT's csv or json of captions, or MSVD's lines or csv of captions, and a list of test videos"
ACTIONS = "UCF101's testlist01.txt and classInd.txt, or HMDB51's <class>_test_split1.txt"
TOGETHER = 1024  # tokens of the texts that are scored in one forward, after the prompt that they share


# ---- files


def load_captions(paths: list[Path]) -> list[Item]:
    """Captions as queries; the reference of an item is its caption."""
    pairs, listed = [], None
    for path in paths:
        if path.suffix == ".pkl":
            raise DataError(f"{path} is a pickle, which can run any code and is not read. Give the captions as text.")
        lines = _named_lines(path) if path.suffix not in (".json", ".csv") else []
        if path.suffix == ".json":
            pairs += _from_json(path)
        elif path.suffix == ".csv":
            pairs += _from_csv(path)
        elif all(" " not in line for line in lines):
            listed = set(lines)
        else:
            for number, line in enumerate(lines, 1):
                video, _, said = line.partition(" ")
                if not said:
                    what = f"{line[:60]!r} is a name without a caption"
                    raise DataError(f"{path}, line {number}: {what}. Expected {CAPTIONS}.")
                pairs.append((video, said.strip()))
    pairs = [(video, said) for video, said in pairs if listed is None or video in listed]
    if not pairs:
        raise DataError(
            f"There are no captions{' of the listed videos' if listed else ''} in {_all(paths)}. Expected {CAPTIONS}."
        )
    return [Item(str(number), video, (), said) for number, (video, said) in enumerate(pairs)]


def _from_json(path: Path) -> list[tuple[str, str]]:
    found = entries(path, CAPTIONS)
    if "sentences" not in found[0]:
        raise DataError(f"{path}: found the keys {', '.join(list(found[0])[:8])}. Expected {CAPTIONS}.")
    try:
        return [(str(each["video_id"]), str(each["caption"]).strip()) for each in found[0]["sentences"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: a sentence has no {error}. Expected {CAPTIONS}.") from None


def _from_csv(path: Path) -> list[tuple[str, str]]:
    rows = csv_rows(path)
    columns = set(rows[0]) if rows else set()
    if {"video_id", "sentence"} <= columns:
        if short := [number for number, row in enumerate(rows, 2) if not (row["video_id"] and row["sentence"])]:
            raise DataError(f"{path}, line {short[0]}: it has no video_id or no sentence. Expected {CAPTIONS}.")
        return [(row["video_id"], row["sentence"].strip()) for row in rows]
    if {"VideoID", "Start", "End", "Language", "Description"} <= columns:
        return [
            (f"{row['VideoID']}_{row['Start']}_{row['End']}", row["Description"].strip())
            for row in rows
            if row["Language"] == "English" and (row["Description"] or "").strip()
        ]
    raise DataError(f"{path}: found the columns {', '.join(map(str, columns)) or 'none'}. Expected {CAPTIONS}.")


def load_actions(paths: list[Path]) -> list[Item]:
    """Test videos; the reference of an item is its class in words, among all classes of the files."""
    items, classes = [], set()
    for path in paths:
        lines = [line.split() for line in _named_lines(path)]
        of_hmdb = re.fullmatch(r"(.+)_test_split\d+", path.stem)
        if all(len(line) == 2 and line[0].isdecimal() for line in lines):  # classInd.txt
            classes |= {words_of_class(name) for _, name in lines}
        elif of_hmdb and all(len(line) == 2 and line[1] in ("0", "1", "2") for line in lines):
            found = words_of_class(of_hmdb[1])
            classes.add(found)
            items += [(name, found) for name, kind in lines if kind == "2"]
        elif all(line and "/" in line[0] and len(line) <= 2 for line in lines):
            items += [(line[0], words_of_class(line[0].split("/")[0])) for line in lines]
        else:
            shown = " ".join(next(line for line in lines if line))[:60]
            raise DataError(f"{path}: lines such as {shown!r} were found. Expected {ACTIONS}.")
    if not items:
        raise DataError(f"There are no test videos in {_all(paths)}. Expected {ACTIONS}.")
    classes = classes or {found for _, found in items}
    if strange := {found for _, found in items} - classes:
        raise DataError(f"The class {min(strange)!r} of a test video is not in the list of classes, {_all(paths)}.")
    among = tuple(sorted(classes))
    return [Item(name, name, (), found, among=among) for name, found in items]


def words_of_class(name: str) -> str:
    """ "ApplyEyeMakeup" and "apply_eye_makeup" -> "apply eye makeup"."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_", " ", name).lower()


def _named_lines(path: Path) -> list[str]:
    """`# ` begins a comment in MSVD's file, `#437` the name of a video in HMDB51's."""
    lines = [line for line in lines_of(path) if not re.match(r"#(\W|$)", line)]
    if not lines:
        raise DataError(f"{path}: it is empty.")
    return lines


def _all(paths: list[Path]) -> str:
    return ", ".join(map(str, paths[:3])) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


# ---- scores


@torch.no_grad()
def score_texts(role: ActiveRole, prompt: Sequence, texts: list[list[int]]) -> list[float]:
    """Mean log-probability, in nats per token, of each text (ids, its EOS included) as the answer to `prompt`.

    The texts share the prompt with its video (see `model.answers`), as many as fit `TOGETHER` tokens at a time."""
    scores = []
    for chunk in _chunks(texts, TOGETHER):
        sums = answer_logps(role, [Group(prompt, chunk)]).tolist()
        scores += [logp / len(ids) for logp, ids in zip(sums, chunk, strict=True)]
    return scores


def _chunks(texts: list[list[int]], most: int) -> list[list[list[int]]]:
    """Runs of texts with at most so many tokens, at least one text each."""
    out, size = [], most + 1
    for ids in texts:
        if size + len(ids) > most:
            out.append([])
            size = 0
        out[-1].append(ids)
        size += len(ids)
    return out


def rank(scores: Seq[float], right: int) -> int:
    """The place of entry `right`, from 1; entries with its score stand before it."""
    return sum(score >= scores[right] for score in scores)


def tally(item: Item, row: dict) -> Tally:
    """Whether the right one was among the first: of videos 1, 5 and 10; of classes 1 and 5, with the prior taken off
    and as the model says it."""
    if "uncalibrated_rank" not in row:
        return {f"R@{k}": (float(row["rank"] <= k), 1.0) for k in (1, 5, 10)}
    return {
        f"{name}_{k}": (float(row[which] <= k), 1.0)
        for name, which in (("top", "rank"), ("uncalibrated_top", "uncalibrated_rank"))
        for k in (1, 5)
    }
