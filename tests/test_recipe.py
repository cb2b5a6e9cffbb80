"""Recipes: what is refused, how it is said (file, line, expectation, nearest name), and what a resolved recipe is."""

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlaif_lite.errors import RecipeError
from rlaif_lite.recipe import (
    Recipe,
    check_files,
    dump_yaml,
    fields,
    flatten,
    json_schema,
    load_recipe,
    marked_yaml,
    neutral_keys,
    recipe_hash,
    show_fields,
)

SHIPPED = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test works in an empty folder, so that messages show short relative paths."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str, name: str = "x.yaml") -> str:
    Path(name).write_text(text)
    return name


def refused(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as error:
        load_recipe(write(text), overrides)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------- one bad value


def test_unknown_key_names_line_and_nearest():
    assert refused("name: a\nppo:\n  lr: 1e-4\n  kl_cof: 0.1\n") == (
        "`ppo.kl_cof` is not a recipe key (x.yaml:4). Did you mean `ppo.kl_coef`?"
    )


@pytest.mark.parametrize(
    ("line", "suggestion"),
    [
        ("ppo.kl_coef: 0.1", "Write `kl_coef` below `ppo`, indented."),
        ("kl_coeff: 0.1", "Did you mean `ppo.kl_coef`?"),  # in the wrong section
        ("sft: {hardd: {}}", "Did you mean `sft.hard`?"),
        ("features: {prune: [{pol: 3}]}", "Did you mean `features.prune.pool`?"),
        ("model: {zzz: 1}", "The keys there are: base, revision, quantization,"),
    ],
)
def test_unknown_key_suggestions(line, suggestion):
    message = refused(f"name: a\n{line}\n")
    assert "(x.yaml:2)" in message and suggestion in message


@pytest.mark.parametrize(
    ("line", "found", "expected"),
    [
        ("seed: 1.5", "`seed` is 1.5 (x.yaml:2)", "a whole number, at least 0: seed of"),
        ("seed: '1'", "`seed` is '1' (text) (x.yaml:2)", "a whole number"),
        ("seed: true", "`seed` is true (true/false) (x.yaml:2)", "a whole number"),
        ("ppo: {clip: high}", "`ppo.clip` is 'high' (text)", "a number, above 0 and below 1"),
        ("ppo: {gamma: 1.5}", "`ppo.gamma` is 1.5", "a number, at least 0 and at most 1"),
        ("ppo: {lr: .nan}", "`ppo.lr` is nan", "a number, above 0"),
        ("ppo: {whiten_rewards: yes}", "`ppo.whiten_rewards` is 'yes' (text)", "true or false"),
        ("ppo: {value: both}", "`ppo.value` is 'both' (text)", "one of adapter | none"),
        ("ppo: {micro_batch: 0}", "`ppo.micro_batch` is 0", "a whole number, at least 1, auto, or null"),
        ("sft: 3", "`sft` is 3 (x.yaml:2)", "a section, keys indented below it"),
        ("ppo: null", "`ppo` is null", "a section"),
        ("data: {rl: prompts.json}", "`data.rl` is 'prompts.json' (text)", "a list"),
        ("data: {rl: [3]}", "`data.rl[0]` is 3 (x.yaml:2)", "a list, each text"),
        ("evaluate: {roles: [sft, rl]}", "`evaluate.roles[1]` is 'rl'", "each one of base | sft | reference | policy"),
        ("preference: {pairwise: {choices: [A]}}", "`preference.pairwise.choices[1]` is missing", "a list of 2"),
        ("features: {prune: [{st_mean: false}]}", "`features.prune[0].st_mean` is false", "true or null"),
        ("model: {lora: {targets: []}}", "`model.lora.targets` is a list of 0", "a list, each text, not empty"),
    ],
)
def test_wrong_values_say_what_was_found_and_expected(line, found, expected):
    message = refused(f"name: a\n{line}\n")
    assert found in message and expected in message


def test_missing_name_and_unusable_name():
    assert refused("seed: 1\n") == "`name` is missing (x.yaml), expected text, of letters, digits and . _ -: " + (
        "name of the recipe; names the run folder."
    )
    assert "`name` is '../up' (text) (x.yaml:1)" in refused("name: ../up\n")


def test_all_errors_are_listed():
    message = refused("name: a\nseed: x\nppo: {kl_cof: 1, clip: 3}\n", "ppo.stepz=3", "reward.floor=2")
    lines = message.splitlines()
    assert len(lines) == 5
    assert sum("(x.yaml:3)" in line for line in lines) == 2
    assert "`ppo.stepz` is not a recipe key (override `ppo.stepz=3`). Did you mean `ppo.steps`?" in lines
    assert any(line.startswith("`reward.floor` is 2 (override `reward.floor=2`)") for line in lines)


# --------------------------------------------------------------------------------------------------------- YAML itself


def test_numbers_and_words_are_read_as_they_look():
    recipe = load_recipe(
        write(
            "name: a\nppo: {lr: 1e-4, kl_coef: .5}\nsft: {easy: {lr: 1E-3, weight_decay: 1}}\n"
            "preference: {claims: {yes: yes, no: no}}\n"
        )
    )
    assert recipe.ppo.lr == 0.0001 and recipe.ppo.kl_coef == 0.5
    assert recipe.sft.easy.lr == 0.001 and isinstance(recipe.sft.easy.weight_decay, float)
    assert (recipe.preference.claims.yes, recipe.preference.claims.no) == ("yes", "no")


def test_duplicate_keys_name_both_lines():
    message = refused("name: a\nppo:\n  lr: 1e-4\n  clip: 0.2\n  lr: 2e-4\nname: b\n")
    assert "`ppo.lr` stands twice: x.yaml:3 and x.yaml:5. Keep one of them." in message
    assert "`name` stands twice: x.yaml:1 and x.yaml:6." in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: a\nppo: {lr: 1\nsft: 2\n", "Not readable as YAML"),
        ("name: a\n\tseed: 1\n", "(x.yaml:2)"),
        ("name: a\n---\nname: b\n", "(x.yaml:2)"),
        ("name: &x [*x]\n", "(x.yaml:1)"),
        ("name: !!python/object:os.system a\n", "(x.yaml:1). Write a plain value."),
        ("name: a\nseed: !!int ten\n", "'ten' is not what its tag"),
        ("? [a, b]\n: c\n", "A key must be one word"),
        ("name: \x01\n", "Not readable as YAML"),
        ("", "x.yaml is empty"),
        ("- name\n", "x.yaml holds a list of 1"),
    ],
)
def test_broken_yaml(text, said):
    assert said in refused(text)


def test_binary_file():
    Path("x.yaml").write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(RecipeError, match=r"x\.yaml:1 cannot be read as a text file"):
        load_recipe("x.yaml")


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"))  # a recipe with a NUL is refused


@example("a\x85b\u2028")  # line breaks that PyYAML folds unless they stand in double quotes
@example({"no": ["no", "1e-4", "1_0", "~", "0x1", "2024-01-01", " a: b #", "x\n\n y\n"]})
@settings(deadline=None, max_examples=60)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
        max_leaves=8,
    )
)
def test_dump_reads_back_to_the_same(data):
    assert marked_yaml.parse(marked_yaml.dump(data), "x.yaml").data == data


# ----------------------------------------------------------------------------------------------------- finding recipes


def test_missing_recipe_lists_near_names():
    Path("recipes").mkdir()
    write("name: tiny\n", "recipes/tiny.yaml")
    with pytest.raises(RecipeError, match=r"recipes/tinny\.yaml is not there.* at hand: recipes/tiny\.yaml"):
        load_recipe("recipes/tinny.yaml")
    with pytest.raises(RecipeError, match=r"recipes is a folder.*recipes/tiny\.yaml"):
        load_recipe("recipes")


def test_a_bare_name_is_a_shipped_recipe():
    Path("recipes").mkdir()
    write("name: mine\n", "recipes/mine.yaml")
    assert load_recipe("mine").name == "mine" == load_recipe("mine.yaml").name


# ----------------------------------------------------------------------------------------------------- overrides, base


def test_overrides_are_yaml_and_reach_sections_that_are_null():
    recipe = load_recipe(
        write("name: a\ndata: {world: null}\nsft: {policy_init: null}\n"),
        [
            "data.world.seed=3",
            "sft.policy_init.lr=1e-3",
            "ppo.kl_target=null",
            "features.prune=[{pool: 4}, {evs: 0.5}]",
            "data.rl=[a.json]",
            "data.rl=[b.json]",
            "context.prompt=What happens?",
        ],
    )
    assert recipe.data.world.seed == 3 and recipe.data.world.test == 300
    assert recipe.sft.policy_init.lr == 0.001 and recipe.sft.policy_init.schedule == "cosine"
    assert recipe.ppo.kl_target is None
    assert [step.model_dump() for step in recipe.features.prune] == [{"pool": 4}, {"evs": 0.5}]
    assert recipe.where("data.world.seed") == "override `data.world.seed=3`" and recipe.where("data.test") == "x.yaml:2"
    assert recipe.data.rl == ("b.json",) and recipe.context.prompt == "What happens?"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("ppo.lr", "The override `ppo.lr` is not of the form key=value"),
        ("=3", "not of the form key=value"),
        ("ppo..lr=3", "not of the form key=value"),
        ("ppo.lr=[1", "(override `ppo.lr=[1`)"),
        ("name.x=1", "`name` is 'a' (text) and has no keys (override `name.x=1`)"),
        ("ppo=3", "`ppo` is 3 (override `ppo=3`), expected a section"),
        ("ppo.minibatch=200", "`ppo.minibatch` (override `ppo.minibatch=200`) is 200, above ppo.rollouts: 96"),
    ],
)
def test_bad_overrides_name_the_override(override, said):
    assert said in refused("name: a\n", override)


def test_base_recipe_merges_and_errors_name_the_right_file():
    Path("recipes").mkdir()
    write("name: low\nseed: 7\nppo:\n  lr: 1e-3\n  clip: 0.3\ndata: {rl: [a, b]}\n", "recipes/low.yaml")
    top = write("base_recipe: low.yaml\nname: top\nppo:\n  clip: 0.1\ndata: {rl: [c]}\n", "recipes/top.yaml")
    recipe = load_recipe(top)
    assert (recipe.name, recipe.seed, recipe.ppo.lr, recipe.ppo.clip, recipe.data.rl) == ("top", 7, 0.001, 0.1, ("c",))
    assert recipe.where("ppo.lr") == "recipes/low.yaml:4" and recipe.where("ppo.clip") == "recipes/top.yaml:4"
    assert recipe.where("data.rl[0]") == "recipes/top.yaml:5" and recipe.where("reward.floor") == "recipes/top.yaml"
    assert recipe.where("ppo.gamma") == "recipes/top.yaml:3"

    write("name: low\nppo:\n  kl_cof: 1\n", "recipes/low.yaml")
    with pytest.raises(RecipeError, match=r"`ppo\.kl_cof` .*\(recipes/low\.yaml:3\)"):
        load_recipe(top)


def test_base_recipe_is_one_level_deep():
    write("name: lowest\n", "lowest.yaml")
    write("base_recipe: lowest.yaml\n", "low.yaml")
    message = refused("name: a\nbase_recipe: low.yaml\n")
    assert "low.yaml has a `base_recipe` itself (low.yaml:1)" in message and "(x.yaml:2)" in message
    assert "names lo.yaml, which is not a file (x.yaml:1). In " in refused("base_recipe: lo.yaml\n")
    assert "low.yaml" in refused("base_recipe: lo.yaml\n")
    assert "`base_recipe` is 3, expected the path" in refused("base_recipe: 3\n")


# ----------------------------------------------------------------------------------------------------- across sections


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("ppo: {value: none}", "`ppo.value` (x.yaml:2) is none, which compares answers to one prompt"),
        ("ppo: {value: none, baseline: batch, whiten_advantages: false}", "`ppo.baseline` (x.yaml:2) is batch, and"),
        ("ppo: {feedback: ranking}", "`ppo.feedback` (x.yaml:2) is ranking, which orders answers to one prompt"),
        ("ppo: {kl_in: loss}", "`ppo.kl_in` (x.yaml:2) is loss, where k1 has no gradient"),
        ("ppo: {value: none, group_size: 4, whiten_rewards: true}", "`ppo.whiten_rewards` (x.yaml:2) scales rewards"),
        ("ppo: {kl_target: 2, kl_coef: 0}", "`ppo.kl_target` (x.yaml:2) adapts ppo.kl_coef, which is 0"),
        ("ppo: {feedback: interventions}\nmodel: {reward_base: {base: b}}", "`model.reward_base` (x.yaml:3) is for a"),
        ("ppo: {feedback: interventions}\ndata: {pairs: [a]}", "`data.pairs` (x.yaml:3) is for a reward model"),
        ("method: dpo\nmodel: {reward_base: {base: b}}", "`model.reward_base` (x.yaml:3) is for a reward model"),
        ("method: dpo\ndpo: {divide: {}}\npreference: {judge: pairwise, consistent_only: true}", "is about two orders"),
        ("evaluate: {roles: [sft], best_of: 4}", "`evaluate.best_of` (x.yaml:2) is about the policy"),
        ("ppo: {group_size: 5}", "is 96, no multiple of ppo.group_size: 5"),
        ("ppo: {minibatch: 97}", "is 97, above ppo.rollouts: 96"),
        ("ppo: {micro_batch: 49}", "is 49, above ppo.minibatch: 48"),
        ("reward: {micro_batch: 17}", "`reward.micro_batch` (x.yaml:2) is 17, above batch_size: 16"),
        ("sft: {hard: {micro_batch: 33}}", "`sft.hard.micro_batch` (x.yaml:2) is 33"),
        ("preference: {samples: 3}", "is 3, but neighbours form pairs. Make it even."),
        ("preference: {consistent_only: true}", "needs two orders"),
        ("reward: {pool: tokens}", "reward.pool_tokens is empty"),
        ("features: {prune: [{evs: 0.5}, {pool: 4}]}", "as its last step"),
        ("features: {prune: [{evs: 0.5}, {st_mean: true}]}", "as its last step"),
        ("features: {prune: [{pool: 4, evs: 0.5}]}", "`features.prune[0]` (x.yaml:2) takes one key"),
        ("features: {prune: [{}]}", "`features.prune[0]` (x.yaml:2) takes one key"),
        ("context: {markers: [first, then]}", "has 2 words for features.clips: 3"),
        ("data: {rl: ['world:rl']}", "`data.rl[0]` (x.yaml:2) names `world:rl`, but data.world is null"),
        ("data: {world: {}, rl: ['world:lr']}", "which the world does not have. Did you mean `world:rl`?"),
        ("data: {sft: [a], sft_easy: [b]}", "`data.sft` (x.yaml:2) stands beside"),
        ("preference: {claims: {prompt: '{context} {clam}'}}", "has {clam}, which nothing fills in"),
        ("preference: {claims: {prompt: '{claim}'}}", "lacks {context}. Put it where that text goes."),
        ("preference: {claims: {mode: inline, prompt: '{context} {claim}'}}", "has {claim}, which nothing fills in"),
        ("preference: {pairwise: {prompt: '{context}{a}'}}", "lacks {b}"),
        ("preference: {pairwise: {context_prefix: 'x'}}", "lacks {context}"),
        ("reward: {prompt: 'rate {'}", "has a brace too many or too few"),
        ("output: 'runs/{nam}'", "has {nam}, which nothing fills in. It may have {name}, {seed}."),
    ],
)
def test_values_that_contradict_each_other(body, said):
    assert said in refused(f"name: a\n{body}\n")


def test_what_belongs_together_passes():
    load_recipe(
        write(
            "name: a\nppo: {value: none, group_size: 4, minibatch: 96, micro_batch: 96}\n"
            "preference: {samples: 4, judge: pairwise, consistent_only: true}\n"
            "features: {clips: 2, prune: [{pool: 4}, {st_mean: true}]}\ncontext: {markers: [a, b]}\n"
            "reward: {pool: tokens, pool_tokens: [.], prompt: 'rate: {question} {{}}'}\n"
            "data: {world: {}, sft: ['world:sft_easy']}\n"
        )
    )


# --------------------------------------------------------------------------------------------------------------- files

COMPLETE = """name: a
data:
  world: {seed: 1}
  sft: [sft.json]
  policy_init: ['world:policy_init']
  preference: ['world:preference']
  rl:
    - 'world:rl'
    - more/rl.json
  test: ['world:test']
"""


def test_check_files_names_missing_files_and_what_is_there():
    recipe = load_recipe(write(COMPLETE), ["data.video_root=videos", "model.base=./base"])
    write("[]", "sft.jsonl")
    with pytest.raises(RecipeError) as error:
        check_files(recipe)
    sft, rl, root, base = str(error.value).splitlines()
    assert sft.startswith("`data.sft[0]` (x.yaml:4) names sft.json, which is not a file. In ") and "sft.jsonl" in sft
    assert rl.startswith("`data.rl[1]` (x.yaml:9) names more/rl.json") and "The folder more does not exist" in rl
    assert "(override `data.video_root=videos`) names videos, which is not a folder" in root
    assert "(override `model.base=./base`) names ./base, which is not a folder" in base

    for folder in ("more", "videos", "base"):
        Path(folder).mkdir()
    write("[]", "sft.json")
    write("[]", "more/rl.json")
    check_files(recipe)


def test_check_files_names_stages_without_data():
    recipe = load_recipe(write(COMPLETE), ["data.rl=[]", "data.policy_init=[]", "data.test=[]", "data.sft=[]"])
    with pytest.raises(RecipeError) as error:
        check_files(recipe)
    lines = str(error.value).splitlines()
    keys = ["data.sft_easy", "data.sft_hard", "data.policy_init", "data.rl", "data.test"]
    assert [line.split("`")[1] for line in lines] == keys
    assert lines[2].endswith("Give files (or [world:policy_init]), or set `sft.policy_init: null`.")

    none = ["data.rl=['world:rl']", "data.policy_init=[]", "data.test=[]", "data.sft=[]"]
    off = ["sft.easy=null", "sft.hard=null", "sft.policy_init=null", "evaluate.roles=[]"]
    check_files(load_recipe("x.yaml", [*none, *off]))


# --------------------------------------------------------------------------------------------------------------- views


def test_output_is_filled_in_and_where_survives():
    recipe = load_recipe(write("name: a\noutput: 'out/{name}-{seed}'\n"), ["seed=4"])
    assert recipe.output == "out/a-4" and recipe.where("output") == "x.yaml:2"
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 5


def test_flatten_has_every_key_that_is_written_or_default():
    flat = flatten(load_recipe(write("name: a\ndata: {rl: [x.json]}\n")))
    assert flat["ppo.kl_coef"] == 0.1 and flat["data.rl"] == ["x.json"] and flat["data.world"] is None
    flat = flatten(
        load_recipe(
            "x.yaml", ["data.world={}", "model.reward_base={base: b}", "dpo.divide={train: {}}", "dpo.describe={}"]
        )
    )
    assert set(flat) == {key for key, info in fields().items() if not info.section and "[]" not in key}


def test_hash_follows_results_and_nothing_else():
    plain = recipe_hash(load_recipe(write("name: a\ndata: {world: {}}\n")))
    assert len(plain) == 12
    assert recipe_hash(load_recipe(write("data: {world: {seed: 0}}\nname: z\nppo: {kl_coef: 1e-1}\n"))) == plain
    other = {
        "name": "b",
        "output": "elsewhere",
        "device": "cpu",
        "health": "warn",
        "model.gradient_checkpointing": "true",
        "data.folder": "w",
        "features.cache": "c",
        "track": "[tensorboard]",
    }
    for key in neutral_keys():
        assert key in fields(), key
        assert recipe_hash(load_recipe("x.yaml", [f"{key}={other.get(key, 7)}"])) == plain, key
    for override in ("seed=1", "data.world.seed=1", "ppo.lr=1e-5", "features.prune=[{pool: 4}]", "data.rl=[a]"):
        assert recipe_hash(load_recipe("x.yaml", [override])) != plain, override


def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch, tmp_path):
    """Every key that takes a path; the recipe's own fields say which they are."""
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = ("output", "features.cache", "data.folder", "data.video_root", "sft.adapter", "reward.adapter", "model.base")
    lists = ("sft_easy", "sft_hard", "policy_init", "pairs", "rl", "test")
    given = [f"{key}=~/x" for key in keys] + [f"data.{name}=[~/x]" for name in lists] + ["data.preference=[]"]
    found = flatten(load_recipe(write("name: a\n"), given))
    assert [found[key] for key in keys] == [f"{tmp_path}/x"] * len(keys)
    assert [found[f"data.{name}"] for name in lists] == [[f"{tmp_path}/x"]] * len(lists)


def test_resolved_recipe_reads_back():
    recipe = load_recipe(write(COMPLETE), ["features.prune=[{pool: 4}, {evs: 0.5}]", "preference.claims.yes='1e-4'"])
    again = load_recipe(write(dump_yaml(recipe), "resolved.yaml"))
    assert flatten(again) == flatten(recipe) and recipe_hash(again) == recipe_hash(recipe)


def test_every_key_has_help_and_shows_its_default():
    infos = fields()
    assert all(info.help for info in infos.values())
    text = show_fields()
    assert "  kl_coef: 0.1 " in text and "name: required" in text and "  world: null" in text
    assert text.count("\n") >= len(infos) - 1
    assert show_fields("ppo.lr").startswith("  lr: ") and "kl_coef" not in show_fields("ppo.lr")
    with pytest.raises(RecipeError, match="Did you mean `ppo.lr_end`"):
        show_fields("ppo.lr_en")


def test_json_schema_refuses_what_the_recipe_refuses():
    schema = json_schema()
    assert schema["required"] == ["name"] and "base_recipe" in schema["properties"]
    sections = [schema, *schema["$defs"].values()]
    assert all(section["additionalProperties"] is False for section in sections)
    assert schema["$defs"]["Ppo"]["properties"]["clip"]["exclusiveMaximum"] == 1


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_recipes_load(path):
    assert isinstance(load_recipe(path), Recipe)
