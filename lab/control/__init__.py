"""RLIF in its original setting (arXiv 2311.12996), in small: a control task, an intervener, no task reward.

    python -m lab.control --seeds 5 --out docs/results/control.json

`rule` says when the intervener takes over, what reward that gives and what is stored; `learner` is the off-policy
learner and the imitator; `tasks` the environments; `study` the experiment. Needs gymnasium, the extra `control`.
"""
