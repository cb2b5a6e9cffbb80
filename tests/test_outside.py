"""A judge from outside the run labels preferences and rewards PPO: an endpoint (a real HTTP server on this machine) or
a second model."""

import json

import pytest
import torch

from core import record
from judge_server import KEY, Server
from rlaif_lite import pipeline
from rlaif_lite.errors import JudgeError, RecipeError
from rlaif_lite.files import read_jsonl
from rlaif_lite.judge.outside import Case
from rlaif_lite.judge.outside.answers import open_judge, score_answers
from rlaif_lite.judge.outside.cached import CachedJudge
from rlaif_lite.judge.outside.endpoint import Endpoint
from rlaif_lite.judge.outside.prompts import prompt_of
from rlaif_lite.recipe import Outside
from rlaif_lite.stages.dpo.judges import score_answers as score_round
from rlaif_lite.stages.judging import Answers
from rlaif_lite.stages.ppo.outside import filled
from rlaif_lite.stages.ppo.ranking import RankingFeedback
from rlaif_lite.workspace import Workspace
from test_judge_endpoint import cases


def words_in(text: str) -> int:
    """What the server scores by."""
    return min(10, len(set(text.split())))


def keys_for(server: Server) -> list[str]:
    """The recipe's keys of a judge at the server, which scores by `words_in`."""
    server.says = lambda prediction: json.dumps({"score": words_in(prediction)})
    named = {"url": server.url, "model": "judge", "key": "JUDGE_KEY"}
    return [f"preference.outside.{key}={value}" for key, value in named.items()]


def asked(server: Server) -> int:
    """How many requests there were, without the one that asks who serves the name."""
    return sum(server.calls.values()) - server.calls["probe"]


def shows_no_key(work: Workspace, said) -> bool:
    files = [path for path in work.folder.rglob("*") if path.is_file()]
    return KEY not in said.out + said.err and not any(KEY.encode() in path.read_bytes() for path in files)


def test_an_endpoint_labels_the_pairs_and_is_paid_once(rerun, server, capsys):
    recipe = rerun("preference.judge=outside", "preference.compare_pairs=0", *keys_for(server))
    summary = pipeline.run(recipe, until="preference")
    work = Workspace(recipe)
    pairs = read_jsonl(work.stage("preference") / "pairs.jsonl")
    assert pairs and summary["preference"]["judge"] == "outside" and summary["preference"]["verdicts_without_mass"] == 0
    for pair in pairs:
        assert pair["margin"] == words_in(pair["chosen"]) - words_in(pair["rejected"]) > 0
    body = next(body for _, body in server.requests if "<prediction>" in body["messages"][0]["content"])
    prompt, narratives = body["messages"][0]["content"], work.narratives().values()
    assert any(f"<video>{text}</video>" in prompt for text in narratives) and body["temperature"] == 0
    before = asked(server)
    assert before == len({(r["key"], a) for r in read_rows(work) for a in r["answers"]} & compared(work))
    pipeline.run(recipe, until="preference", again="preference")
    assert asked(server) == before and read_jsonl(work.stage("preference") / "pairs.jsonl") == pairs
    assert shows_no_key(work, capsys.readouterr())


def read_rows(work: Workspace) -> list[dict]:
    return [row for line in read_jsonl(work.stage("preference") / "answers.jsonl") for row in line["results"]]


def compared(work: Workspace) -> set[tuple[str, str]]:
    """(record, answer) of all neighbours that differ."""
    pairs = [
        (r["key"], a, b) for r in read_rows(work) for a, b in zip(r["answers"][::2], r["answers"][1::2], strict=True)
    ]
    return {(key, text) for key, a, b in pairs if a != b for text in (a, b)}


def test_an_endpoint_rewards_ppo_and_is_paid_once(rerun, server, capsys):
    """Answers whose reply cannot be read teach nothing, and count as their group's mean."""
    keys = {
        "feedback": "outside",
        "value": "none",
        "baseline": "group",
        "group_size": 4,
        "steps": 2,
        "stop_penalty": 0.0,
    }
    recipe = rerun(*[f"ppo.{key}={value}" for key, value in keys.items()], *keys_for(server), "evaluate.roles=[]")
    scores = server.says
    server.says = lambda prediction: "well" if len(prediction) % 5 == 0 else scores(prediction)
    pipeline.run(recipe, until="ppo")
    work = Workspace(recipe)
    steps = [line for line in read_jsonl(work.log.path) if line["stage"] == "ppo"]
    verdicts = [json.loads(line) for path in (work.folder / "outside").iterdir() for line in path.open()]
    unread = [verdict for verdict in verdicts if verdict["problem"]]
    assert len(steps) == 2 and unread and all("no score from 0 to 10" in verdict["problem"] for verdict in unread)
    assert all(0 <= step["objective/scores"] <= 10 for step in steps)
    assert any(0 < step["judge/unread"] == pytest.approx(1 - step["rollout/learnt"], abs=0.3) for step in steps)
    adapter = (work.adapter("policy") / "adapter_model.safetensors").read_bytes()
    before = asked(server)
    pipeline.run(recipe, until="ppo", again="ppo")
    assert asked(server) == before
    assert (work.adapter("policy") / "adapter_model.safetensors").read_bytes() == adapter
    assert shows_no_key(work, capsys.readouterr())


def test_dpo_and_a_ranking_ask_the_same_judge(rerun, server, tmp_path):
    work = Workspace(
        rerun("preference.judge=outside", "ppo.judge_context=false", "ppo.group_size=2", *keys_for(server))
    )
    first, second = work.records("preference")[:2]
    answers = [Answers(first, ["a red circle", "a"], [[1], [2]]), Answers(second, ["up up", "a"], [[1], [2]])]
    server.says = lambda prediction: "?" if prediction == "up up" else json.dumps({"score": words_in(prediction)})
    found = score_round(work, "sft", answers, None, tmp_path / "round", "dpo 1")
    assert found.scores == [[3, 1], [None, 1]] and found.dropped["unread"] == 1
    ranked = RankingFeedback(work)
    assert ranked.by_outside([first, first, second, second], ["a", "a red circle", "up up", "a"]) == [1, 3, 1, 1]
    assert ranked.without_mass == 1 / 4


def test_a_judge_of_which_nothing_can_be_read_ends_the_run(rerun, server):
    recipe = rerun("preference.judge=outside", *keys_for(server))
    server.everybody = "nonsense"
    with pytest.raises(JudgeError, match=r"preference: none of \d+ replies of endpoint:.* holds a score.*run/outside"):
        pipeline.run(recipe, until="preference")


def test_a_budget_ends_what_is_asked_and_not_what_is_known(server, tmp_path):
    """A reply takes 110 tokens here; those of earlier runs count."""

    def judge(budget: int | None) -> CachedJudge:
        return CachedJudge(Endpoint(server.url, "judge"), tmp_path, budget=budget)

    judge(220).judge(cases("one", "two"))
    for _ in range(2):
        with pytest.raises(
            JudgeError, match=r"has used 220 tokens of a budget of 220, and 1 prompts are left.*\.jsonl"
        ):
            judge(220).judge(cases("one", "three"))
    assert [verdict.score for verdict in judge(220).judge(cases("two", "one"))] == [4, 4]
    assert judge(221).judge(cases("three"))[0].score == 4


def test_what_the_judge_reads():
    case = Case("x", "answer", "what is it ?", "a dog", "a cat", "an animal runs", "10 is a haiku.")
    text = prompt_of(case).text
    for part in ("<video>an animal runs</video>", "<question>what is it ?</question>", "<reference>a dog</reference>"):
        assert part in text
    assert "<prediction>a cat</prediction>" in text and "10 is a haiku." in text and "from 0 to 10" in text
    assert "<video></video>" in prompt_of(case._replace(context=None)).text


def test_a_second_model_on_this_machine(checkpoint, tmp_path):
    """Random weights write nothing that can be read: that is said, and kept."""
    judge = open_judge(Outside(model=str(checkpoint)), tmp_path, torch.device("cpu"), 4)
    found = score_answers(
        judge, [(record("what ?", video=None), text, "a square") for text in ("a red circle", "up")], "true."
    )
    assert found == [None, None] and judge.id.startswith(f"local:{checkpoint.name}:")
    (kept,) = tmp_path.iterdir()
    assert len(read_jsonl(kept)) == 2


def test_a_missing_score_is_the_mean_of_its_group():
    assert filled([1.0, None, 3.0, None, None, None], 3) == [1.0, 2.0, 3.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    "keys, message",
    [
        (["preference.judge=outside"], "preference.outside.model.*Name the judge's model"),
        (["ppo.feedback=outside"], "preference.outside.model.*Name the judge's model"),
        (["preference.outside.key=KEY"], "preference.outside.url.*Give its address"),
        (["preference.outside.url=http://h/v1?key=sk-1"], "has a `url` with a `.`, .*would be written into the run"),
        (
            ["preference.outside.url=http://h/v1", "preference.outside.key=sk-1"],
            "has a `key` that is no name of an environment variable",
        ),
    ],
)
def test_what_makes_no_judge_is_refused(recipe, keys, message):
    with pytest.raises(RecipeError, match=message) as error:
        recipe(*keys)
    assert "sk-1" not in str(error.value)
