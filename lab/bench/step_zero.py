"""Before the first update: KL exactly 0 and ratio exactly 1, with and without cuDNN's attention.

    python -m lab.bench.step_zero RECIPE [KEY=VALUE ...] [--random-weights] [--small] [--memory-cap 24GB] [--out FILE]

The run switches cuDNN's attention off, because its plans for a forward with and without gradients differ
(`model/base.py`). On a GPU this says whether that was needed. On a CPU the switch does nothing.
"""

import json
from pathlib import Path

import torch

from rlaif_lite import profiler
from rlaif_lite.recipe import load_recipe
from rlaif_lite.rl.losses import merge_stats, token_weights
from rlaif_lite.stages.ppo import step as ppo
from rlaif_lite.stages.ppo.experience import cut

from .plain_ppo import Step, arguments_of_a_step, micro_size, prepare


def measure(given: Step) -> dict[str, dict[str, float]]:
    """{"without cuDNN", "with cuDNN": largest |KL| of a token, largest |ratio - 1|}, on the same answers."""
    work, feedback, records = given.work, given.feedback, given.records
    section = work.recipe.ppo
    answers = ppo.rollout(work, records, 0)
    minibatches = cut(work, feedback.critic_prompt, records, answers, 0, micro_size(work))
    taken, found = feedback.take(records, answers, 0), {}
    for name, on in (("without cuDNN", False), ("with cuDNN", True)):
        torch.backends.cuda.enable_cudnn_sdp(on)
        e = ppo.score(work.roles, section, feedback, minibatches, taken, section.kl_coef)
        weight_BT = token_weights(e.mask_BT, section.loss_mean, section.max_new_tokens)
        with work.roles.use("policy") as policy:
            stats = [
                ppo.policy_backward(section, policy, micro, e, weight_BT[micro.index_b], None, section.kl_coef)[1]
                for micro in minibatches[0]
            ]
        for parameter in work.roles.parameters("policy"):
            parameter.grad = None
        merged = merge_stats(stats)
        ratio = max(abs(float(merged[key]) - 1) for key in ("ratio_min", "ratio_max"))
        found[name] = {"largest_kl": float(e.kl_BT.abs().max()), "largest_ratio_gap": ratio}
    torch.backends.cuda.enable_cudnn_sdp(False)
    return found


def main(arguments: list[str] | None = None) -> dict:
    ask = arguments_of_a_step(__doc__)
    ask.add_argument("--out", type=Path)
    options = ask.parse_args(arguments)
    recipe = load_recipe(options.recipe, options.overrides)
    random = profiler.Random(options.small) if options.random_weights else None
    torch.set_num_threads(recipe.threads or torch.get_num_threads())
    with profiler.opened(recipe, 1, options.memory_cap, random) as (work, _):
        profiler.cap(options.memory_cap, work.device)
        found = measure(prepare(work))
    for name, gaps in found.items():
        print(f"{name}: " + ", ".join(f"{key} {gap:.3g}" for key, gap in gaps.items()))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
