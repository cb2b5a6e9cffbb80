"""What no single key can say about itself: values that contradict each other, templates, files that are not there.

Each check yields (key, message); `recipe.raise_all` adds where the key was written and lists them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING

from ..errors import ModelError
from .adapter import FILES, read_adapter
from .dpo import Describe, Divide
from .file import did_you_mean, files_near, is_file, is_folder, shortened
from .rules import rule_checks
from .sections import SPLITS, WORLD_SETS, Prune

if TYPE_CHECKING:
    from . import Data, Recipe

DATA_KEYS = ("sft", *SPLITS)
LARGEST = 10**9  # of any number in a recipe; so is steps times batch
CHAT_TEMPLATES = ("vicuna_v1",)  # that `model.families` knows by name


def cross_checks(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yields (key, message) for every pair of values that contradict each other. The message says the fix."""
    yield from _size_checks(recipe)
    yield from _data_checks(recipe.data)
    yield from _template_checks(recipe)
    yield from _outside_checks(recipe)
    features, preference, reward, ppo = recipe.features, recipe.preference, recipe.reward, recipe.ppo
    if recipe.method == "dpo":
        yield from _dpo_checks(recipe)

    either = ", ".join(name for name in Prune.model_fields if name != "pool")
    selectors = [i for i, step in enumerate(features.prune) if step.pool is None]
    for i, step in enumerate(features.prune):
        if len(step.model_fields_set) != 1:
            yield f"features.prune[{i}]", f"takes one key: pool or {either}. Write a list item for each."
    if selectors not in ([], [len(features.prune) - 1]):
        yield "features.prune", f"may have one of {either}, as its last step. Put `pool` first."
    if recipe.context.markers and len(recipe.context.markers) != features.clips:
        words = len(recipe.context.markers)
        yield "context.markers", f"has {words} words for features.clips: {features.clips}. Give one per clip."
    if preference.samples % 2:
        yield "preference.samples", f"is {preference.samples}, but neighbours form pairs. Make it even."
    if preference.consistent_only and preference.judge != "pairwise":
        yield "preference.consistent_only", "needs two orders, which only `preference.judge: pairwise` has. Set that."
    if reward.pool == "tokens" and not reward.pool_tokens:
        yield "reward.pool", "is tokens, but reward.pool_tokens is empty. List the words, or set `reward.pool: last`."

    sft = recipe.sft
    phases = (
        ("sft.easy", sft.easy),
        ("sft.hard", sft.hard),
        ("sft.policy_init", sft.policy_init),
        ("reward", reward),
        ("dpo", recipe.dpo),
    )
    for key, phase in phases:
        if phase is not None and isinstance(phase.micro_batch, int) and phase.micro_batch > phase.batch_size:
            yield f"{key}.micro_batch", f"is {phase.micro_batch}, above batch_size: {phase.batch_size}. Lower it."
    if ppo.value == "none" and ppo.baseline != "batch" and ppo.group_size < 2:
        yield "ppo.value", "is none, which compares answers to one prompt. Set ppo.group_size to 2 or more."
    if ppo.value == "none" and ppo.baseline == "batch" and not ppo.whiten_advantages:
        yield "ppo.baseline", "is batch, and ppo.whiten_advantages, which is all there is of it, false. Set that true."
    if ppo.feedback == "ranking" and ppo.group_size < 2:
        yield "ppo.feedback", "is ranking, which orders answers to one prompt. Set ppo.group_size to 2 or more."
    yield from rule_checks(ppo.rules, recipe.method == "ppo" and ppo.feedback == "rules")
    if ppo.kl_in == "loss" and ppo.kl_estimator == "k1":
        yield "ppo.kl_in", "is loss, where k1 has no gradient on average. Set ppo.kl_estimator to k3 or exact."
    whole = ppo.value == "none" and ppo.baseline != "batch"  # one advantage for a whole answer
    if ppo.policy_loss == "gspo" and not (whole and ppo.loss_mean == "sequence"):
        yield (
            "ppo.policy_loss",
            "is gspo, which weighs whole answers. Set ppo.loss_mean to sequence, ppo.value to none and ppo.baseline to "
            "group or leave_one_out.",
        )
    if ppo.policy_loss == "cispo" and ppo.dual_clip is not None:
        yield "ppo.dual_clip", "bounds the clipped loss, but ppo.policy_loss is cispo. Leave it out."
    if ppo.dual_clip is not None and ppo.dual_clip <= 1 + (ppo.clip_high or ppo.clip):
        yield "ppo.dual_clip", f"is {ppo.dual_clip}, within the range of the clip. Set it above 1 + ppo.clip_high."
    if ppo.skip_equal_groups and not whole:
        yield (
            "ppo.skip_equal_groups",
            "compares answers to one prompt. Set ppo.value to none, and ppo.baseline to group or leave_one_out.",
        )
    if ppo.resample and not (ppo.feedback in ("rules", "outside") and whole):
        yield (
            "ppo.resample",
            "needs scores as soon as the answers are there, of groups. Set ppo.feedback to rules or outside, ppo.value "
            "to none and ppo.baseline to group or leave_one_out.",
        )
    if ppo.order_bonus and not (ppo.feedback == "rules" and ppo.group_size > 1):
        yield (
            "ppo.order_bonus",
            "compares a group's answers with those to the shuffled video. Set ppo.feedback to rules and ppo.group_size "
            "to 2 or more.",
        )
    if ppo.task_std is not None and not (ppo.value == "none" and ppo.baseline == "group" and ppo.group_std):
        yield (
            "ppo.task_std",
            "takes the place of a group's deviation. Set ppo.value to none, ppo.baseline to group and ppo.group_std to "
            "true.",
        )
    if ppo.stop_buffer >= ppo.max_new_tokens:
        yield "ppo.stop_buffer", f"is {ppo.stop_buffer}. Set it below ppo.max_new_tokens: {ppo.max_new_tokens}."
    rewritten = ppo.feedback == "interventions" and ppo.interventions.takeover == "replace"
    if rewritten and ppo.value == "none" and ppo.baseline != "batch":
        yield (
            "ppo.interventions.takeover",
            "is replace, which makes several parts of an answer, but ppo.baseline compares whole ones. Set it to "
            "batch.",
        )
    if ppo.whiten_rewards and ppo.value == "none" and ppo.baseline != "batch":
        yield "ppo.whiten_rewards", "scales rewards of tokens, but ppo.baseline compares whole answers. Set it false."
    if ppo.kl_target is not None and ppo.kl_coef == 0:
        yield "ppo.kl_target", "adapts ppo.kl_coef, which is 0 and stays 0 however it is scaled. Give it a start."
    if recipe.method == "ppo" and ppo.feedback != "reward_model":
        for key, given in (("model.reward_base", recipe.model.reward_base), ("data.pairs", recipe.data.pairs)):
            if given:
                yield key, f"is for a reward model, but ppo.feedback: {ppo.feedback} does without one. Leave it out."
    if recipe.evaluate.best_of is not None and "policy" not in recipe.evaluate.roles:
        yield "evaluate.best_of", "is about the policy, which evaluate.roles leaves out. Put it there, or set null."
    if ppo.rollouts % ppo.group_size:
        yield "ppo.rollouts", f"is {ppo.rollouts}, no multiple of ppo.group_size: {ppo.group_size}. Change either."
    if ppo.minibatch > ppo.rollouts:
        yield "ppo.minibatch", f"is {ppo.minibatch}, above ppo.rollouts: {ppo.rollouts}. Lower it."
    if isinstance(ppo.micro_batch, int) and ppo.micro_batch > ppo.minibatch:
        yield "ppo.micro_batch", f"is {ppo.micro_batch}, above ppo.minibatch: {ppo.minibatch}. Lower it."


def _outside_checks(recipe: Recipe) -> Iterator[tuple[str, str]]:
    outside = recipe.preference.outside
    used = recipe.method == "ppo" and recipe.ppo.feedback == "outside"
    if outside.model is None and (used or recipe.preference.judge == "outside"):
        yield (
            "preference.outside.model",
            "is null, but preference.judge or ppo.feedback is outside. Name the judge's model, and with `url` its "
            "endpoint.",
        )
    if outside.url is None and (outside.key or outside.body):
        yield "preference.outside.url", "is null, but a key or body is for an endpoint. Give its address."
    # where these two were written is not said, as an override would repeat what may be a key
    if outside.url is not None and "?" in outside.url:
        yield (
            "preference.outside",
            "has a `url` with a `?`, and what follows would be written into the run folder. Put a key into an "
            "environment variable and name that in `key`.",
        )
    if outside.key is not None and not outside.key.isidentifier():
        yield "preference.outside", "has a `key` that is no name of an environment variable. Name the one with the key."


def _size_checks(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Numbers, and steps times batch, beyond what any run can take."""

    def walk(value: object, key: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict):
            for name, item in value.items():
                yield from walk(item, f"{key}.{name}" if key else name)
            steps, batch = value.get("steps"), value.get("rollouts") or value.get("batch_size")
            if isinstance(steps, int) and isinstance(batch, int) and max(steps, batch) <= LARGEST < steps * batch:
                yield f"{key}.steps", f"is {steps}, times {batch} is above {LARGEST:.0e} answers or records. Lower it."
        elif isinstance(value, (int, float)) and abs(value) > (2**63 - 1 if key.endswith("seed") else LARGEST):
            yield key, f"is {str(value)[:30]}, more than any run can take. Set it to {LARGEST:.0e} at most."

    yield from walk(recipe.model_dump(mode="json"), "")


def _dpo_checks(recipe: Recipe) -> Iterator[tuple[str, str]]:
    dpo, preference = recipe.dpo, recipe.preference
    if recipe.data.pairs:
        yield "data.pairs", "is read by `method: ppo` only; rounds answer prompts anew. Give `data.preference` instead."
    if recipe.model.reward_base is not None:
        yield "model.reward_base", "is for a reward model, which `method: dpo` does without. Leave it out."
    if dpo.describe is not None and not preference.context:
        yield "dpo.describe", "makes the judge's context, but preference.context is false. Set that to true."
    if dpo.altered:
        for key, given in (("dpo.divide", dpo.divide), ("dpo.describe", dpo.describe)):
            if given is not None:
                yield key, "is about a judge, which dpo.altered does without. Leave one of them out."
        if dpo.balance_lengths:
            yield "dpo.balance_lengths", "is about two answers, but dpo.altered compares videos. Set it false."
        if dpo.spans is not None:
            yield "dpo.spans", "is where two answers differ, but dpo.altered compares videos. Set it to null."
    if dpo.divide is None:
        return
    if preference.claims.mode != "ask":
        yield "preference.claims.mode", "is inline, but dpo.divide asks about claims. Set it to ask, with {claim}."
    if preference.consistent_only:
        yield "preference.consistent_only", "is about two orders, but dpo.divide judges single answers. Set it false."
    if dpo.divide.train is not None and recipe.data.world is None:
        yield "dpo.divide.train", "learns from the synthetic world's texts, and data.world is null. Set it to null."
    if dpo.divide.train is not None and dpo.divide.split is None and dpo.divide.ask is None:
        yield "dpo.divide.train", "trains to split and to ask, but dpo.divide.split and .ask are null. Set it to null."
    if dpo.divide.train is not None and dpo.divide.train.steps is None:
        yield "dpo.divide.train.steps", "is null, but its texts are drawn without end. Say how many steps."
    if dpo.divide.train is not None and dpo.divide.model is not None:
        yield "dpo.divide.train", "trains an adapter of the run's base, but dpo.divide.model is another. Set one."


def _data_checks(data: Data) -> Iterator[tuple[str, str]]:
    for name in DATA_KEYS:
        for i, entry in enumerate(getattr(data, name)):
            kind, _, which = entry.partition(":")
            if kind != "world":
                continue
            if which not in WORLD_SETS:
                hint = did_you_mean(which, WORLD_SETS, "world:") or f"The sets are {', '.join(WORLD_SETS)}."
                yield f"data.{name}[{i}]", f"names `{entry}`, which the world does not have. {hint}"
            elif data.world is None:
                yield f"data.{name}[{i}]", f"names `{entry}`, but data.world is null. Set `data.world: {{seed: 0}}`."
    if data.sft and (data.sft_easy or data.sft_hard):
        yield "data.sft", "stands beside data.sft_easy or data.sft_hard. Give `sft` (split by length) or the two."
    if data.pairs and data.preference:
        yield "data.pairs", "stands beside data.preference. Give pairs, or prompts that are answered and judged anew."


def _template_checks(recipe: Recipe) -> Iterator[tuple[str, str]]:
    claims, pairwise = recipe.preference.claims, recipe.preference.pairwise
    context = {"context"} if recipe.reward.context else set()
    in_claims = {"context", "claim", "question"} if claims.mode == "ask" else {"context", "question"}
    divide, describe = recipe.dpo.divide or Divide(), recipe.dpo.describe or Describe()
    templates = (  # key, template, placeholders that must stand in it, placeholders that may
        ("output", recipe.output, set(), {"name", "seed"}),
        ("preference.claims.prompt", claims.prompt, {"context", "claim"} & in_claims, in_claims),
        ("preference.claims.context_prefix", claims.context_prefix, {"context"}, {"context"}),
        ("preference.pairwise.prompt", pairwise.prompt, {"context", "a", "b"}, {"context", "a", "b", "question"}),
        ("preference.pairwise.context_prefix", pairwise.context_prefix, {"context"}, {"context"}),
        ("reward.prompt", recipe.reward.prompt or "", context, {"question"} | context),
        (
            "ppo.interventions.checklist.prompt",
            recipe.ppo.interventions.checklist.prompt,
            {"context", "claim"},
            {"context", "claim"},
        ),
        ("dpo.divide.split", divide.split or "{answer}", {"answer"}, {"answer", "question"}),
        ("dpo.divide.ask", divide.ask or "{claim}", {"claim"}, {"claim"}),
        ("dpo.describe.prompt", describe.prompt, {"context"}, {"context"}),
    )
    for key, template, must, may in templates:
        try:
            parts = [part for part in Formatter().parse(template) if part[1] is not None]
        except ValueError as error:
            yield key, f"has a brace too many or too few ({error}). Write {{{{ and }}}} for braces that are meant."
            continue
        if formatted := [name for _, name, spec, conversion in parts if spec or conversion]:
            yield key, f"formats {_braced(set(formatted))} with `!` or `:`. Write the name alone between the braces."
        found = {name for _, name, _, _ in parts}
        if missing := must - found:
            yield key, f"lacks {_braced(missing)}. Put it where that text goes."
        if strange := found - may:
            yield key, f"has {_braced(strange)}, which nothing fills in. It may have {_braced(may)}."


def _braced(names: set[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in sorted(names))


def _adapter_checks(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The adapters to start from: are they there, safe from this run, and of the shape that every role has?"""
    lora = recipe.model.lora
    wanted = {"rank": lora.rank, "alpha": lora.alpha, "targets": sorted(lora.targets)}
    for key, name, files in (
        ("sft.adapter", recipe.sft.adapter, FILES),
        ("reward.adapter", recipe.reward.adapter, (*FILES, "head.safetensors")),
    ):
        if name is None:
            continue
        folder = Path(name)
        if missing := [file for file in files if not is_file(folder / file)]:
            yield (
                key,
                f"names {name}, which lacks {', '.join(missing)}. `rlaif-lite import` and runs write such folders.",
            )
        elif folder.resolve().is_relative_to(Path(recipe.output).resolve()):
            yield key, f"names {name}, inside this run's own folder, where it may be replaced. Set another `output`."
        else:
            try:
                shape = read_adapter(folder)
            except ModelError as error:
                yield key, f"names {name}, which cannot be used. {error}"
                continue
            for what, found in shape._asdict().items():
                if found != wanted[what]:
                    here = f"`model.lora.{what}` ({recipe.where(f'model.lora.{what}')}) is {wanted[what]}"
                    yield (
                        key,
                        f"names {name}, whose {what} is {found}, but {here}. All roles have one shape: set it so.",
                    )


def file_checks(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) for every file or folder that the recipe names and that is not there."""
    data, sft = recipe.data, recipe.sft
    for name in (*DATA_KEYS, "pairs"):
        for i, entry in enumerate(getattr(data, name)):
            if (name == "pairs" or not entry.startswith("world:")) and not (is_file(entry) or is_folder(entry)):
                near = files_near(Path(entry))
                yield f"data.{name}[{i}]", f"names {shortened(entry)}, which is not a file. {near}"
    if data.video_root is not None and not is_folder(data.video_root):
        yield "data.video_root", f"names {data.video_root}, which is not a folder. Paths start at {Path.cwd()}."
    synonyms = recipe.evaluate.synonyms
    if synonyms is not None and not is_file(synonyms):
        yield "evaluate.synonyms", f"names {synonyms}, which is not a file. {files_near(Path(synonyms))}"
    own = recipe.model.reward_base
    for key, base in (("model.base", recipe.model.base), ("model.reward_base.base", own.base if own else "embedded")):
        is_path = base.startswith((".", "/", "~")) or base.count("/") > 1  # a hub id is `name` or `owner/name`
        if is_path and not is_folder(base):
            yield key, f"names {base}, which is not a folder. Paths start at {Path.cwd()}."
    templates = {"model.chat_template": recipe.model.chat_template}
    if own is not None:
        templates["model.reward_base.chat_template"] = own.chat_template
    for key, name in templates.items():
        if name is not None and name not in CHAT_TEMPLATES and not is_file(name):
            hint = did_you_mean(name, CHAT_TEMPLATES) or f"Named templates: {', '.join(CHAT_TEMPLATES)}."
            yield key, f"is {name}, which is neither a named template nor a file. {hint}"
    yield from _adapter_checks(recipe)

    dpo = recipe.method == "dpo"
    rewarded = not dpo and recipe.ppo.feedback == "reward_model"
    unmeasured = rewarded and recipe.reward.adapter is not None  # and so it may go without pairs, where it says so
    needs = (  # set, is it given, who asks for it, how to do without
        ("sft_easy", data.sft or data.sft_easy, sft.easy, "sft.easy trains on it", "set `sft.easy: null`"),
        ("sft_hard", data.sft or data.sft_hard, sft.hard, "sft.hard trains on it", "set `sft.hard: null`"),
        ("policy_init", data.policy_init, sft.policy_init, "its phase needs it", "set `sft.policy_init: null`"),
        (
            "preference",
            data.preference or data.pairs,
            dpo or rewarded and (not unmeasured or recipe.reward.floor > 0),
            "the preference stage asks its questions",
            "give `data.pairs`" + ", or set `reward.floor: 0` to use reward.adapter unmeasured" * unmeasured,
        ),
        ("rl", data.rl, not dpo, "PPO takes its prompts from it", None),
        ("test", data.test, recipe.evaluate.roles, "the evaluation asks its questions", "set `evaluate.roles: []`"),
    )
    for name, given, asked, why, without in needs:
        if asked and not given:
            world = f" (or [world:{name}])" if data.world else ""
            yield f"data.{name}", f"is empty, but {why}. Give files{world}{', or ' + without if without else ''}."
