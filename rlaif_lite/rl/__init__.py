"""Reinforcement-learning arithmetic as pure functions of tensors; the one state is `TaskDeviation`'s."""
