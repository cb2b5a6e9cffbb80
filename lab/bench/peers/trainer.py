"""A callback for packages that train with transformers' Trainer. A step lasts from the end of the one before to the
end of the optimiser's update, so that reading and preparing the batch is in it."""

from transformers import TrainerCallback
from turns import Turns


class TakesTurns(TrainerCallback):
    """Waits for its turn before every optimiser step."""

    def __init__(self, turns: Turns):
        self.turns = turns

    def on_train_begin(self, args, state, control, model=None, **_):
        self.turns.count_positions(model)
        self.turns.next()

    def on_step_end(self, args, state, control, **_):
        self.turns.next()
