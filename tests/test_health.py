"""A run that learns nothing says so once and stops, or goes on where the recipe says so."""

import pytest

from rlaif_lite import pipeline
from rlaif_lite.errors import StageError
from rlaif_lite.files import read_json, read_jsonl, write_json
from rlaif_lite.report import page
from rlaif_lite.stages.ppo.feedback import RewardModelFeedback
from rlaif_lite.training.health import PATIENCE, SIGNS, counted, findings, signs_of
from rlaif_lite.training.loop import MetricsLog

SICK = {
    "constant_rewards": {"objective/scores_std": 0.0},
    "groups_without_signal": {"objective/flat_groups": 1.0},
    "empty_answers": {"rollout/empty_rate": 1.0},
    "endless_answers": {"rollout/stop_rate": 0.0},
    "lost_reference": {"objective/kl_over_bound": 1.0},
    "no_gradient": {"policy/grad_norm": 0.0, "grad_norm": 0.0},
    "silent_judge": {"judge/without_mass": 0.6},
    "unknown_tokens": {"unknown_share": 0.9},
}
WELL = {
    "objective/scores_std": 0.3,
    "objective/flat_groups": 0.5,
    "rollout/empty_rate": 0.1,
    "rollout/stop_rate": 0.9,
    "objective/kl_over_bound": 0.0,
    "policy/grad_norm": 0.1,
    "grad_norm": 0.1,
    "unknown_share": 0.0,
    "judge/without_mass": 0.2,
}


@pytest.mark.parametrize("name", SIGNS)
@pytest.mark.parametrize("mode", ["warn", "stop"])
def test_each_sign_is_said_once_and_stops_where_nothing_can_be_learnt(tmp_path, capfd, name, mode):
    assert signs_of(WELL) == [] and signs_of(WELL | SICK[name]) == [name]
    log = MetricsLog(tmp_path / "metrics.jsonl", health=mode)
    log.append("ppo", 0, WELL)
    for step in range(1, PATIENCE):
        log.append("ppo", step, SICK[name])
    assert capfd.readouterr().err == ""  # a few may be chance
    if mode == "stop" and SIGNS[name].hopeless:
        with pytest.raises(StageError, match=f"in {PATIENCE} steps in a row up to step {PATIENCE}.*health: warn"):
            log.append("ppo", PATIENCE, SICK[name])
    else:
        for step in range(PATIENCE, PATIENCE + 4):
            log.append("ppo", step, SICK[name])
        assert capfd.readouterr().err.count("WARNING ppo") == 1


def test_steps_are_counted_by_stage():
    lines = [{"stage": stage, "step": step} | SICK["no_gradient"] for stage in ("sft.easy", "ppo") for step in (3, 4)]
    found = findings([{"stage": "ppo", "step": 0} | WELL, *lines])
    assert [(f["stage"], f["sign"], f["first_step"], f["steps"]) for f in found] == [
        ("sft.easy", "no_gradient", 3, 2),
        ("ppo", "no_gradient", 3, 2),
    ]


def test_a_constant_reward_stops_ppo_and_is_in_the_report(rerun, monkeypatch, capfd):
    read = RewardModelFeedback.read
    monkeypatch.setattr(RewardModelFeedback, "read", lambda self, records, answers: read(self, records, answers) * 0)
    keys = ("ppo.steps=5", "ppo.stop_penalty=0", "evaluate.roles=[]")
    with pytest.raises(StageError, match="ppo: in 3 steps in a row up to step 2, all answers have the same reward"):
        pipeline.run(rerun(*keys))
    recipe = rerun(*keys, "health=warn")
    pipeline.run(recipe)
    (sign,) = [sign for sign in read_json(pipeline.Path(recipe.output) / "summary.json")["health"]
               if sign["sign"] == "constant_rewards"]  # fmt: skip
    assert sign["steps"] == 5 and sign["first_step"] == 0
    assert "all answers have the same reward" in page.write(pipeline.Path(recipe.output)).read_text(encoding="utf-8")


def test_the_report_counts_captions_and_verdicts_that_say_nothing(rerun):
    recipe = rerun()
    results = {"context": {"empty_captions": 4}, "preference": {"verdicts_without_mass": 0}, "reward": {}}
    (empty,) = counted(results)
    assert (empty["stage"], empty["sign"], empty["steps"]) == ("context", "empty_captions", 4)
    path = pipeline.Path(recipe.output) / "summary.json"
    write_json(path, read_json(path) | {"health": [empty]})
    assert "context, 4 times: a caption has no word" in page.write(path.parent).read_text(encoding="utf-8")


def test_every_stage_that_trains_on_texts_counts_unknown_tokens(finished):
    lines = read_jsonl(pipeline.Path(finished.output) / "metrics.jsonl")
    assert {line["stage"] for line in lines if "unknown_share" in line} >= {"sft.easy", "sft.hard", "reward"}
    assert all(0 <= line["unknown_share"] < 0.2 for line in lines if "unknown_share" in line)


def test_one_prompt_has_a_scale(rerun):
    """The deviation of one score is not a divergence."""
    from rlaif_lite.workspace import Workspace

    work = Workspace(rerun())
    work.load_role("reference")
    feedback = RewardModelFeedback(work)
    work._loaded = work._loaded._replace(records={"rl": work.records("rl")[:1]})
    mean, std = feedback.scale()
    assert std == 1.0 and mean == mean
