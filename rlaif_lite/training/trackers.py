"""TensorBoard, Weights & Biases and trackio, fed with the lines of `metrics.jsonl`, through accelerate's trackers.

A resumed run continues its curves, and a step that is computed again does not show twice:

    tensorboard   RUN_DIR/tensorboard/STAGE; the new event file purges the steps from where the stage resumes on
    wandb         one run per run folder, continued by its id (`RUN_DIR/tracking_id`). What was sent cannot be deleted,
                  so steps that were sent are not sent again: a resumed run computes them bit-equal
    trackio       as wandb

A stage that starts again from nothing (`--from`, a changed recipe) sends its steps again. TensorBoard then shows the
new curve; wandb and trackio show both.
"""

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

Name = Literal["tensorboard", "wandb", "trackio"]
PROJECT = "rlaif-lite"


class Trackers:
    """The trackers of one run. Nothing is opened, and no package loaded, before the first step."""

    def __init__(self, names: Sequence[Name], folder: Path, config: Mapping[str, Any]):
        """`folder`: the run's; its name is the run's name. `config`: what wandb shows as the run's settings."""
        self._names, self._folder, self._config = names, folder, config
        self._boards: dict[str, Any] = {}  # TensorBoard: a folder of events per stage, since each counts its own steps
        self._services: dict[str, Any] = {}  # wandb and trackio: one run
        self._sent: dict[str, int] = {}
        self._defined: set[str] = set()

    def resume(self, stage: str, step: int, sent: int) -> None:
        """The stage goes on at `step`; `sent` is the last step that was logged before, -1 for none."""
        self._sent[stage] = sent
        if "tensorboard" in self._names:
            self._board(stage, purge_step=step)

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """One step of a stage, under the names `STAGE/VALUE`."""
        named = {f"{stage}/{name}": value for name, value in values.items()}
        for name in self._names:
            if name == "tensorboard":
                (self._boards.get(stage) or self._board(stage, None)).log(named, step=step)
            elif step > self._sent.get(stage, -1):
                service = self._services.get(name) or self._start(name)
                if name == "wandb":  # its own step must grow over all stages: each stage has one of its own
                    if stage not in self._defined:
                        self._defined.add(stage)
                        service.tracker.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
                    service.log(named | {f"{stage}/step": step})
                else:
                    service.log(named, step=step)

    def finish(self) -> None:
        """Close everything that was opened."""
        for tracker in (*self._boards.values(), *self._services.values()):
            tracker.finish()
        self._boards, self._services = {}, {}

    def _board(self, stage: str, purge_step: int | None) -> Any:
        from accelerate import PartialState
        from accelerate.tracking import TensorBoardTracker

        PartialState()  # accelerate's logger asks for it
        if stage in self._boards:
            self._boards[stage].finish()
        board = TensorBoardTracker(stage, self._folder / "tensorboard", purge_step=purge_step)
        board.start()
        self._boards[stage] = board
        return board

    def _start(self, name: Name) -> Any:
        from accelerate import PartialState
        from accelerate.tracking import TrackioTracker, WandBTracker

        PartialState()
        if name == "wandb":
            tracker = WandBTracker(
                PROJECT, id=self._id(), name=self._folder.name, dir=str(self._folder), resume="allow"
            )
        else:
            tracker = TrackioTracker(PROJECT, name=f"{self._folder.name}-{self._id()}", resume="allow")
        tracker.start()
        if name == "wandb":
            tracker.store_init_configuration(dict(self._config))
        self._services[name] = tracker
        return tracker

    def _id(self) -> str:
        """The run's id at a service: drawn once, and kept in the run folder."""
        path = self._folder / "tracking_id"
        if not path.exists():
            path.write_text(secrets.token_hex(4), encoding="utf-8")
        return path.read_text(encoding="utf-8")
