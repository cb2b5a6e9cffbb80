"""Several ranks: the same answers, pairs and judgements as one process, the same adapters but for rounding; kills,
memory that runs out, bad input.

The ranks are forks of one process that has imported everything, in the environment that `torchrun` gives. One test
starts them by torchrun itself.
"""

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file

from core import small_recipe
from rlaif_lite.files import read_jsonl
from rlaif_lite.recipe import Recipe, dump_yaml

ROOT = Path(__file__).parent.parent
RELATIVE = 1e-5  # of adapters, in float32
# Each line of the input starts ranks: what each of them runs, and the environment. Prints their process ids, then, when
# all have ended, their exit codes.
SERVER = """
import json, os, sys, torch
torch.set_num_threads(1)
from rlaif_lite import cli, pipeline
from rlaif_lite.model.base import load_base
from rlaif_lite.recipe import load_recipe
load_base(load_recipe(sys.argv[1]).model, torch.device("cpu"))
for line in sys.stdin:
    asked = json.loads(line)
    pids = []
    for rank, code in enumerate(asked["code"]):
        pid = os.fork()
        if pid == 0:
            os.environ |= asked["env"] | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            log = os.open(f"{asked['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1)
            status = 1
            try:
                exec(code, {})
                status = 0
            except SystemExit as error:
                status = error.code or 0
            except BaseException:
                import traceback
                traceback.print_exc()
            os._exit(status)
        pids.append(pid)
    print(json.dumps(pids), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
"""
RUN = """
from pathlib import Path
from rlaif_lite import pipeline, ranks
from rlaif_lite.recipe import load_recipe
with ranks.joined():
    for path, again, until in {jobs!r}:
        pipeline.run(load_recipe(path), again=again, until=until)
"""


class Ended(NamedTuple):
    """What became of some ranks."""

    codes: list[int]
    said: list[str]
    seconds: float


class Ranks:
    """Starts ranks."""

    def __init__(self, path: Path):
        self.path = path
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, codes: list[str], port: int | None = None) -> list[int]:
        count = str(len(codes))
        env = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
        env |= {"MASTER_PORT": str(port or free_port()), "GLOO_SOCKET_IFNAME": "lo"}
        self.count, self.began = len(codes), time.monotonic()
        asked = {"code": codes, "env": env, "log": str(self.path.with_suffix(".log"))}
        self.server.stdin.write(json.dumps(asked) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def wait(self) -> Ended:
        codes = json.loads(self.server.stdout.readline())
        seconds = time.monotonic() - self.began
        logs = [Path(f"{self.path.with_suffix('.log')}.{rank}") for rank in range(self.count)]
        return Ended(codes, [log.read_text() for log in logs], seconds)

    def run(self, codes: list[str], port: int | None = None) -> Ended:
        self.start(codes, port)
        return self.wait()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def ranks_of(finished, tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks") / "recipe.yaml"
    path.write_text(dump_yaml(finished))
    server = Ranks(path)
    yield server
    server.server.kill()
    server.server.wait()


# ------------------------------------------------------------------------------------------- the same as one process

GROUPS = ("ppo.value=none", "ppo.baseline=group", "ppo.group_size=2", "ppo.rollouts=12", "ppo.minibatch=6")
DPO = ("method=dpo", "dpo.rounds=1", "dpo.steps=3", "dpo.batch_size=4", "dpo.lr=0.001", "evaluate.roles=[sft,policy]")
CASES = {  # keys, the stages to run again
    "finished": ((), ("features", "sft", "context", "preference", "reward", "ppo", "evaluate")),
    "pieces": (("reward.micro_batch=1", "ppo.micro_batch=1", "ppo.steps=1"), ("reward", "ppo")),
    "groups": ((*GROUPS, "ppo.steps=2"), ("ppo",)),
    "dpo": (DPO, ("dpo",)),
}


def prepared(finished: Recipe, folder: Path) -> dict[str, Path]:
    """A copy of the finished run for each case -> its recipe's file."""
    found = {}
    for name, (keys, _) in CASES.items():
        shutil.copytree(finished.output, folder / name / "run", dirs_exist_ok=True)
        recipe = small_recipe(Path(finished.model.base), folder / name, *keys)
        found[name] = folder / name / "recipe.yaml"
        found[name].write_text(dump_yaml(recipe))
        for cached in (folder / name / "run" / "features" / "cache").glob("*") if name == "finished" else ():
            cached.unlink()
    return found


def jobs(paths: dict[str, Path]) -> list[tuple[str, str | None, str]]:
    return [(str(paths[name]), stage, stage) for name, (_, stages) in CASES.items() for stage in stages]


@pytest.fixture(scope="module")
def one(finished, ranks_of, tmp_path_factory) -> Path:
    """The cases, run by one process."""
    return run_cases(finished, ranks_of, tmp_path_factory.mktemp("one"), 1)


def run_cases(finished: Recipe, ranks_of: Ranks, folder: Path, count: int) -> Path:
    code = RUN.format(jobs=jobs(prepared(finished, folder)))
    ended = ranks_of.run([code] * count)
    assert ended.codes == [0] * count, ended.said
    assert not any(ended.said[1:]), ended.said  # rank 0 alone speaks
    return folder


@pytest.fixture(scope="module", params=[2, 3])
def both(request, one, finished, ranks_of, tmp_path_factory) -> tuple[Path, Path]:
    """(the cases of one process, of several ranks)"""
    return one, run_cases(finished, ranks_of, tmp_path_factory.mktemp("ranks"), request.param)


def written(run: Path, *patterns: str) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for pattern in patterns for p in sorted(run.glob(pattern))}


def test_features_narratives_answers_and_judgements_have_the_same_bytes(both):
    patterns = ("features/*.json", "features/cache/*", "context/*captions*", "context/narratives.json")
    patterns += ("preference/p*", "preference/answers.jsonl", "preference/judgements.json", "preference/judged/*")
    one, several = (written(folder / "finished" / "run", *patterns) for folder in both)
    for files in (one, several):
        files.pop("preference/done.json", None)
    assert len(one) > 40 and one.keys() == several.keys()
    assert [name for name in one if one[name] != several[name]] == []


def test_answers_of_dpo_and_of_the_evaluation_have_the_same_bytes(both):
    """The evaluation reads adapters that differ by rounding: what it says does not."""
    for case, patterns in (
        ("dpo", ("dpo/round1/answers.jsonl", "dpo/round1/judged.jsonl", "dpo/round1/pairs.jsonl")),
        ("finished", ("evaluate/*.jsonl",)),
    ):
        one, several = (written(folder / case / "run", *patterns) for folder in both)
        assert one and one == several


def apart(one: Path, several: Path) -> float:
    """|difference| / |adapter|, over all tensors of a folder."""
    tensors = [(load_file(p), load_file(several / p.name)) for p in one.glob("*.safetensors")]
    pairs = [(a[key], b[key]) for a, b in tensors for key in a]
    size = sum(a.double().square().sum() for a, _ in pairs)
    return float((sum((a.double() - b.double()).square().sum() for a, b in pairs) / size).sqrt())


@pytest.mark.parametrize(
    ("case", "role"),
    [("finished", r) for r in ("sft", "reference", "reward", "policy", "value")]
    + [("pieces", "reward"), ("pieces", "policy"), ("pieces", "value"), ("groups", "policy"), ("dpo", "policy")],
)
def test_adapters_are_those_of_one_process(both, case, role):
    one, several = (folder / case / "run" / "adapters" / role for folder in both)
    assert apart(one, several) < RELATIVE


@pytest.mark.parametrize("case", CASES)
def test_metrics_agree(both, case):
    one, several = (read_jsonl(folder / case / "run" / "metrics.jsonl") for folder in both)
    assert len(one) == len(several)
    for a, b in zip(one, several, strict=True):
        a.pop("time", None), b.pop("time", None)
        assert a == pytest.approx(b, rel=2e-3, abs=2e-4), (a["stage"], a["step"])
