"""The plug-in of lmms-eval, in the real package: `pip install lmms-eval` in an environment of its own, then
`python -m pytest tests/test_lmms_eval.py` there. Without the package these tests are skipped."""

import json
import logging
from pathlib import Path

import pytest
import torch

from rlaif_lite.exchange import export as exporter
from rlaif_lite.model.roles import Roles
from rlaif_lite.recipe import dump_yaml, load_recipe

pytest.importorskip("lmms_eval", reason="lmms-eval pins other versions: an environment of its own")
from lmms_eval import evaluator  # noqa: E402
from lmms_eval.api.instance import Instance  # noqa: E402
from lmms_eval.models import MODEL_REGISTRY_V2  # noqa: E402
from lmms_eval.tasks import TaskManager  # noqa: E402
from PIL import Image  # noqa: E402

import benchmark_files as files  # noqa: E402
from core import shake  # noqa: E402
from rlaif_lite.benchmarks.lmms import Model, cut  # noqa: E402
from rlaif_lite.errors import DataError, RlaifError  # noqa: E402

VIDEOS = files.facts(6)
# The world's questions about the first event, whose answer is a word of the caption.
TASK = """\
task: world_shapes
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.video_of
doc_to_text: "what is the shape first ?"
doc_to_target: "{{answer}}"
generation_kwargs: {max_new_tokens: 4, temperature: 0, until: ["."]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A run on the embedded base whose policy is a little off it, with half of the tokens."""
    folder = tmp_path_factory.mktemp("lmms")
    keys = ["model.quantization=none", "features.prune=[{evs: 0.5}]", f"output={folder / 'run'}", "device=cpu"]
    recipe = load_recipe("tiny", keys)
    from rlaif_lite.model.base import load_base

    roles = Roles(load_base(recipe.model, torch.device("cpu"), tower=False), recipe.model.lora)
    roles.add("policy", seed=0)
    shake(roles, "policy", size=0.01)
    roles.save("policy", folder / "run" / "adapters" / "policy")
    (folder / "run" / "recipe.yaml").write_text(dump_yaml(recipe))
    return folder / "run"


@pytest.fixture(scope="module")
def tasks(world, tmp_path_factory) -> TaskManager:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"video": str(world / "videos" / "test" / f"{name}.mp4"), "answer": facts["events"][0][1]}
        for name, facts in VIDEOS
    ]
    (folder / "world.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "world.yaml").write_text(TASK.replace("DATA", str(folder / "world.jsonl")))
    (folder / "utils.py").write_text("def video_of(doc):\n    return [doc['video']]\n")
    return TaskManager("ERROR", include_path=str(folder))


def evaluate(tasks: TaskManager, **arguments: str) -> tuple[float, list[str]]:
    """(share of right answers, answers) of the real evaluator."""
    given = ",".join(f"{key}={value}" for key, value in arguments.items())
    found = evaluator.simple_evaluate(
        model="rlaif_lite",
        model_args=given,
        tasks=["world_shapes"],
        task_manager=tasks,
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"]["world_shapes"], key=lambda sample: sample["doc_id"])
    return found["results"]["world_shapes"]["exact_match,none"], [sample["filtered_resps"][0] for sample in samples]


def test_the_entry_point_is_found():
    assert MODEL_REGISTRY_V2.get_model_class("rlaif_lite") is Model


def test_adapter_and_merged_folder_agree(run_dir, tasks, tmp_path):
    right, answers = evaluate(tasks, run=run_dir, role="policy")
    assert len(answers) == len(VIDEOS) and right >= 0.5  # the embedded base knows shapes
    assert right == sum(
        answer.strip() == facts["events"][0][1] for answer, (_, facts) in zip(answers, VIDEOS, strict=True)
    ) / len(VIDEOS)

    exporter.export(run_dir, "policy", tmp_path / "merged", check=False)
    recipe = load_recipe(run_dir / "recipe.yaml", [f"model.base={tmp_path / 'merged'}", f"output={tmp_path / 'run'}"])
    (tmp_path / "merged.yaml").write_text(dump_yaml(recipe))
    merged = evaluate(tasks, run=tmp_path / "merged.yaml", role="base")
    assert merged == (right, answers)
    _, plain = evaluate(tasks, run="tiny", role="base")
    assert (run_dir / "bench" / "lmms-eval" / "videos.json").is_file() and len(plain) == len(VIDEOS)


def test_in_4_bits(run_dir, tasks, tmp_path):
    recipe = load_recipe(run_dir / "recipe.yaml", ["model.quantization=nf4"])
    (run_dir / "recipe.yaml").write_text(dump_yaml(recipe))
    right, answers = evaluate(tasks, run=run_dir, role="policy")
    assert len(answers) == len(VIDEOS) and right >= 0.5


def request(model: Model, document: dict, contents: list[dict], **settings) -> Instance:
    model.task_dict = {"task": {"test": [document]}}
    arguments = ("", lambda doc: [{"role": "user", "content": contents}], settings, 0, "task", "test")
    return Instance(
        request_type="generate_until", arguments=arguments, idx=0, metadata={"task": "task", "doc_id": 0, "repeats": 1}
    )


def test_pictures_missing_videos_and_what_is_refused(run_dir, world, caplog):
    model = Model(run=str(run_dir))
    video = {"type": "video", "url": str(world / "videos" / "test" / "00000.mp4")}
    text = {"type": "text", "text": "describe the clip"}
    picture = {"type": "image", "url": Image.new("RGB", (64, 64), "red")}
    (answer,) = model.generate_until([request(model, {}, [picture, text], max_new_tokens=8)])
    assert answer and len(list((run_dir / "bench" / "lmms-eval" / "pictures").iterdir())) == 1
    with caplog.at_level(logging.WARNING):
        (answer,) = model.generate_until([request(model, {}, [{"type": "video", "url": "/nowhere.mp4"}, text])])
    assert answer == "" and "/nowhere.mp4" in caplog.text and "counts as wrong" in caplog.text
    (unseen,) = model.generate_until([request(model, {}, [text], max_new_tokens=3)])
    assert isinstance(unseen, str)
    with pytest.raises(DataError, match="task task, test, document 0: 2 videos, 0 pictures and 0 sounds"):
        model.generate_until([request(model, {}, [video, video, text])])
    parts = [video | {"start_time": start, "end_time": start + 1} for start in (0.0, 2.0)]
    first, last = (model.generate_until([request(model, {}, [part, text], max_new_tokens=8)]) for part in parts)
    events = VIDEOS[0][1]["events"]  # a second each, of a colour and a shape
    assert [event[1] in answer for event, (answer,) in zip(events[::2], (first, last), strict=True)] == [True, True]
    with pytest.raises(RlaifError, match="generate_until"):
        model.loglikelihood([])
    assert cut("a. b\nc", ("\n", ".")) == "a" and cut("a", (".", "")) == "a"


def test_several_processes_are_refused(run_dir, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RlaifError, match="one process"):
        Model(run=str(run_dir))
