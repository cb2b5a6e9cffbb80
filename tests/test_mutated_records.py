"""Mutated data files: every one is read or refused by a DataError, within two seconds, and no record gains a word.

300 mutations in every run of the suite; `CAMPAIGN=3000 pytest tests/test_mutated_records.py` for the campaign.
"""

import json
import os
import random
import re
import time

import pytest

from rlaif_lite.data.formats.questions import DESCRIBE
from rlaif_lite.data.readers import read_records
from rlaif_lite.errors import DataError
from test_your_data import EXAMPLES

COUNT = int(os.environ.get("CAMPAIGN", "300"))
DEEP: object = "bottom"
for _ in range(200):
    DEEP = [DEEP]
JUNK = [
    None,
    True,
    False,
    0,
    -1,
    1e308,
    float("nan"),
    float("inf"),
    10**400,
    "",
    " ",
    "\ud800",
    "a\0b",
    "<video>",
    "<image>",
]
JUNK += ["x" * 100_000, [], {}, [None], [[]], {"type": "text"}, {"type": "video", "video": None}, {"path": None}, DEEP]
JUNK += [
    "http://x.org/a.mp4",
    "../../etc/passwd",
    "~",
    {"from": {}},
    {"role": [], "content": {}},
    "assistant",
    ["a", "b"],
]
ADDED = sorted({key for text in EXAMPLES.values() for line in text.splitlines() for key in json.loads(line)})
ADDED += ["label", "kto_tag", "start", "end", "audios", "tools", "system", "history", "rejected_messages", "vido"]
MARK = "<(video|image)>"
OURS = {*DESCRIBE.split(), "Options:"}


def nodes(value, path=()):
    """Every place in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from nodes(item, (*path, key))


def changed(value, rng: random.Random):
    """The value with one place replaced, deleted, doubled or added."""
    path = rng.choice(list(nodes(value)))
    if not path or rng.random() < 0.2:
        return value | {rng.choice(ADDED): rng.choice(JUNK)} if isinstance(value, dict) else rng.choice(JUNK)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    key, how = path[-1], rng.random()
    if how < 0.6:
        holder[key] = rng.choice(JUNK)
    elif how < 0.75:
        del holder[key]
    elif how < 0.85 and isinstance(holder, list):
        holder.append(holder[key])
    else:
        holder[key] = [holder[key]] if rng.random() < 0.5 else {"value": holder[key]}
    return value


def damaged(text: str, rng: random.Random) -> str:
    """The text of a file with one piece cut out, doubled, or replaced."""
    start, end = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    end = min(end, start + rng.choice((1, 5, 200)))
    piece = rng.choice(("", text[start:end] * 2, rng.choice('{}[]",:\\\0\n'), "\ufeff", "\\ud800", "[" * 3000, text))
    return text[:start] + piece + text[end:]


@pytest.mark.parametrize("part", range(10))
def test_every_mutation_is_read_or_refused(tmp_path, part):
    rng = random.Random(part)
    read = 0
    for i in range(COUNT // 10):
        name = rng.choice(list(EXAMPLES))
        objects = [json.loads(line) for line in EXAMPLES[name].splitlines()]
        at = rng.randrange(len(objects))
        for _ in range(rng.choice((1, 1, 2, 3))):
            objects[at] = changed(objects[at], rng)
        listed = rng.random() < 0.5
        text = json.dumps(objects) if listed else "\n".join(map(json.dumps, objects))
        text = damaged(text, rng) if rng.random() < 0.4 else text
        path = tmp_path / f"{i}.{'json' if listed else 'jsonl'}"
        path.write_text(text, encoding="utf-8")
        began = time.perf_counter()
        try:
            records = read_records(path).records
        except DataError as error:
            assert str(path) in str(error) and len(str(error)) < 1500, (name, text[:2000], error)
            records = []
        assert time.perf_counter() - began < 2, (name, text[:2000])
        if records:
            read += 1
            given = re.sub(MARK, " ", " ".join(strings(text)))
            for record in records:
                said = [m.content for m in record.messages] + [record.chosen or "", record.rejected or ""]
                words = set(re.sub(MARK, " ", " ".join(said)).split()) - OURS
                assert not [word[:200] for word in words if word not in given], (name, text[:2000])
    assert read  # some mutations leave a file that can be read


def strings(text: str) -> list[str]:
    """Every text in a file of JSON values, decoded; the reader found it to be JSON."""
    found = []
    decoder = json.JSONDecoder()
    for match in re.finditer(r'"(?:[^"\\]|\\.)*"', text):
        try:
            found.append(decoder.raw_decode(match[0])[0])
        except ValueError:
            continue
    return found + re.findall(r"-?\d[\w.+-]*|NaN|Infinity|true|false", text)
