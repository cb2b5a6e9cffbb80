"""Benchmarks about the synthetic world in the shapes in which their authors ship them, made from the videos' facts."""

import base64
import csv
import json
import random
from pathlib import Path

from rlaif_lite.data.world import facts_of
from rlaif_lite.data.world_text import COLOURS, SHAPES, caption, claim, describe

DESCRIBE = "describe the video"


def facts(count: int, seed: int = 5) -> list[tuple[str, dict]]:
    """(name of the video without its extension, what is true of it), of a world's test videos."""
    return [(f"{number:05d}", facts_of(seed, "test", number)) for number in range(count)]


def write(name: str, folder: Path, videos: list[tuple[str, dict]]) -> list[Path]:
    """The files of benchmark `name` about these videos."""
    folder.mkdir(parents=True, exist_ok=True)
    return WRITERS[name.split("-")[-1] if name.endswith(("-qa", "-retrieval")) else name](folder, videos)


def _json(path: Path, value) -> Path:
    path.write_text(json.dumps(value, indent=1))
    return path


def _lines(path: Path, lines: list) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def generic(folder, videos):
    return [_json(folder / "generic_qa.json", [{"video_name": v, "Q": DESCRIBE, "A": describe(f)} for v, f in videos])]


def temporal(folder, videos):
    asked = [{"video_name": v, "Q": "what is the shape then ?", "A": f"{f['events'][1][1]} ."} for v, f in videos]
    return [_json(folder / "temporal_qa.json", asked)]


def consistency(folder, videos):
    asked = [
        {
            "video_name": v,
            "Q1": "what is the colour first ?",
            "Q2": "first what is the colour ?",
            "A": f["events"][0][0],
        }
        for v, f in videos
    ]
    return [_json(folder / "consistency_qa.json", asked)]


def qa(folder, videos):
    """The released form: one file."""
    return [_json(folder / "qa.json", _asked(videos))]


def _asked(videos):
    return [
        {
            "video_name": v,
            "question_id": f"v_{v}_{place}",
            "question": f"what is the {kind} first ?",
            "answer": f["events"][0][place],
            "type": str(place),
        }
        for v, f in videos
        for place, kind in enumerate(("colour", "shape", "motion"))
    ]


def qa_two(folder, videos):
    """Video-ChatGPT's form: two files; the answers in another order."""
    both = _asked(videos)
    questions = [{key: each[key] for key in ("video_name", "question_id", "question")} for each in both]
    answers = [{key: each[key] for key in ("question_id", "answer", "type")} for each in reversed(both)]
    return [_json(folder / "test_q.json", questions), _json(folder / "test_a.json", answers)]


def retrieval(folder, videos):
    """MSR-VTT's csv."""
    path = folder / "MSRVTT_JSFUSION_test.csv"
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["key", "vid_key", "video_id", "sentence"])
        rows.writerows([f"ret{n}", f"msr{v}", v, describe(f)] for n, (v, f) in enumerate(videos))
    return [path]


def msrvtt_json(folder, videos):
    about = {"info": {}, "videos": [{"video_id": v, "split": "test"} for v, _ in videos]}
    about["sentences"] = [{"caption": describe(f), "video_id": v, "sen_id": n} for n, (v, f) in enumerate(videos)]
    return [_json(folder / "test_videodatainfo.json", about)]


def msvd_lines(folder, videos):
    """MSVD's lines, two captions each, and a list of all videos but the last."""
    lines = ["# captions", *(f"{v} {text}" for v, f in videos for text in (describe(f), caption(f, 0)))]
    return [
        _lines(folder / "AllVideoDescriptions.txt", lines),
        _lines(folder / "test_list.txt", [v for v, _ in videos[:-1]]),
    ]


def msvd_csv(folder, videos):
    path = folder / "corpus.csv"
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["VideoID", "Start", "End", "WorkerID", "Source", "AnnotationTime", "Language", "Description"])
        rows.writerows(
            [v, 1, 9, 0, "clean", 5, language, describe(f)] for v, f in videos for language in ("English", "Tamil")
        )
    return [path]


def ucf101(folder, videos):
    """The first colour as class; classInd.txt knows all of them."""
    lines = [f"{f['events'][0][0].title()}/{v}.avi" for v, f in videos]
    classes = [f"{n} {colour.title()}" for n, colour in enumerate(COLOURS, 1)]
    return [_lines(folder / "testlist01.txt", lines), _lines(folder / "classInd.txt", classes)]


def hmdb51(folder, videos):
    """A file per class: the first shape. 1: to train on, 2: to test on, 0: neither."""
    return [
        _lines(
            folder / f"{shape}_test_split1.txt",
            [f"{v}.avi {2 if f['events'][0][1] == shape else n % 2} " for n, (v, f) in enumerate(videos)],
        )
        for shape in SHAPES
    ]


def pope(folder, videos):
    rng = random.Random(0)
    rows = []
    for v, f in videos:
        for _ in range(4):
            asked, is_true = claim(f, rng)
            rows.append(
                {"question_id": len(rows) + 1, "video": f"{v}.mp4", "text": asked, "label": "yes" if is_true else "no"}
            )
    return [_lines(folder / "pope.json", rows)]


def things(f: dict) -> list[str]:
    """What can be seen in a video: "red circle", ... and the star."""
    star = [f"{f['star']} star"] if f["star"] else []
    return [*dict.fromkeys(f"{colour} {shape}" for colour, shape, _ in f["events"]), *star]


def amber(folder, videos):
    rng = random.Random(0)
    queries, notes = [], []
    for v, f in videos:
        absent = [name for name in ("red circle", "yellow star") if name not in things(f)]
        queries.append({"id": len(queries) + 1, "image": f"{v}.jpg", "query": DESCRIBE})
        notes.append({"id": len(notes) + 1, "type": "generative", "truth": things(f), "hallu": absent})
    for v, f in videos:
        asked, is_true = claim(f, rng)
        queries.append({"id": len(queries) + 1, "image": f"{v}.jpg", "query": asked})
        kind = rng.choice(["discriminative-hallucination", "discriminative-relation"])
        notes.append({"id": len(notes) + 1, "type": kind, "truth": "yes" if is_true else "no"})
    relation = {f"{colour} {shape}": [] for colour in COLOURS for shape in (*SHAPES, "star")}
    return [
        _json(folder / "query_all.json", queries),
        _json(folder / "annotations.json", notes),
        _json(folder / "relation.json", relation),
        _lines(folder / "safe_words.txt", ["video"]),
    ]


def objhal(folder, videos):
    """The file of each picture is named; COCO's instances know two of its objects, and its captions the third."""
    prompts = [{"image_id": int(v), "question": DESCRIBE, "image_path": f"{v}.mp4"} for v, _ in videos]
    categories = [{"id": n, "name": shape} for n, shape in enumerate(SHAPES)]
    notes = [
        {"image_id": int(v), "category_id": SHAPES.index(shape)} for v, f in videos for _, shape, _ in f["events"][:2]
    ]
    captions = {"annotations": [{"image_id": int(v), "caption": caption(f, 2).title()} for v, f in videos]}
    coco = {"images": [{"id": int(v)} for v, _ in videos], "annotations": notes, "categories": categories}
    return [
        _lines(folder / "obj_halbench.jsonl", prompts),
        _json(folder / "instances_val2014.json", coco),
        _json(folder / "captions_val2014.json", captions),
        _lines(folder / "synonyms.txt", ["circle, disc", "square, box"]),
    ]


def objhal_inside(folder, videos, picture: bytes):
    """With the picture inside the file, and the objects as a list."""
    prompts = [
        {"image_id": int(v), "question": DESCRIBE, "image": base64.b64encode(picture).decode()} for v, _ in videos
    ]
    objects = [{"image_id": int(v), "objects": [shape for _, shape, _ in f["events"]]} for v, f in videos]
    return [_lines(folder / "prompts.jsonl", prompts), _lines(folder / "objects.jsonl", objects)]


def mmhal(folder, videos):
    rows = [
        {
            "question_type": kind,
            "question_topic": "shapes",
            "image_id": f"id{v}",
            "image_src": f"https://a.org/b/{v}.jpg?c=1",
            "image_content": things(f),
            "question": f"what is the {kind} first ?",
            "gt_answer": f["events"][0][place],
            "model_answer": "",
        }
        for v, f in videos
        for place, kind in enumerate(("colour", "shape"))
    ]
    return [_json(folder / "response_template.json", rows)]


WRITERS = {
    "videochatgpt": generic,
    "videochatgpt-temporal": temporal,
    "videochatgpt-consistency": consistency,
    "qa": qa,
    "retrieval": retrieval,
    "ucf101": ucf101,
    "hmdb51": hmdb51,
    "pope": pope,
    "amber": amber,
    "objhal": objhal,
    "mmhal": mmhal,
    "claims": generic,
}
