"""Several ranks: the same answers, pairs and judgements as one process, the same adapters but for rounding; kills,
memory that runs out, bad input.

The ranks are forks of one process that has imported everything, in the environment that `torchrun` gives. One test
starts them by torchrun itself.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file

from core import small_recipe
from rlaif_lite import ranks
from rlaif_lite.data.records import to_json
from rlaif_lite.files import even_chunks, read_json, read_jsonl
from rlaif_lite.ranks import alone, cores
from rlaif_lite.ranks.world import WORLD
from rlaif_lite.recipe import dump_yaml
from rlaif_lite.workspace import Workspace

pytestmark = pytest.mark.slow
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
            [sys.executable, "-c", SERVER, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"TORCH_CPP_LOG_LEVEL": "ERROR"},  # as a launcher's ranks set it, before torch is there
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

DPO = ("method=dpo", "dpo.rounds=1", "dpo.steps=3", "dpo.batch_size=4", "dpo.lr=0.001", "evaluate.roles=[sft,policy]")
VDPO = (*DPO, "dpo.heldout=0.3", "data.preference=[world:policy_init]", "preference.context=false",
        "dpo.balance_lengths=false", "dpo.altered=[shuffled, other]")  # fmt: skip
RULES = ("ppo.feedback=rules", "ppo.rules.rewards=[{rule: wer}, {rule: length, tokens: [3, 7], weight: 0.5}]",
         "ppo.order_bonus=0.3", "ppo.resample=2", "ppo.stop_penalty=0.0", "ppo.value=none", "ppo.baseline=group",
         "ppo.group_size=2", "ppo.rollouts=12", "ppo.minibatch=6", "ppo.steps=2")  # fmt: skip
RANKING = ("ppo.feedback=ranking", "ppo.group_size=2", "ppo.rollouts=12", "ppo.judge_context=false", "ppo.steps=1")
READ = ("features", "context", "preference", "evaluate")
CASES = {  # keys, and the stages to be done again; training changes adapters by rounding: what reads them comes before
    "read": ((), ()),  # all of READ, in one go
    "trained": ((), ("ppo", "reward", "sft")),
    "pieces": (("reward.micro_batch=1",), ("reward",)),
    "rules": (RULES, ("ppo",)),
    "ranking": (RANKING, ("ppo",)),
    "dpo": (DPO, ("dpo",)),
    "vdpo": (VDPO, ("dpo",)),
}
PREPARED = ("rules", "vdpo")  # other data than the finished run's: one process does all that comes before


def prepared(sources: dict[str, Path], checkpoint: Path, folder: Path, solved: Path) -> list[tuple]:
    """A copy of a run for each case -> (recipe's file, stage to be done again, last stage), in order."""
    jobs = []
    for name, (keys, stages) in CASES.items():
        shutil.copytree(sources[name], folder / name / "run", dirs_exist_ok=True)
        keys = (*keys, f"data.rl=[{solved}]", "evaluate.roles=[]") if name == "rules" else keys
        path = folder / name / "recipe.yaml"
        path.write_text(dump_yaml(small_recipe(checkpoint, folder / name, *keys)))
        jobs += [(str(path), stage, stage) for stage in stages]
    for stage in READ:
        shutil.rmtree(folder / "read" / "run" / stage)
    return [(str(folder / "read" / "recipe.yaml"), None, "evaluate"), *jobs]


@pytest.fixture(scope="module")
def run_cases(finished, ranks_of, tmp_path_factory):
    """run_cases(count of ranks, sources) -> the folder with the cases"""
    solved = tmp_path_factory.mktemp("solved") / "rl.jsonl"
    records = Workspace(finished).records("rl") * 3  # more prompts than a step takes, to be drawn instead
    lines = [to_json(r) | {"solution": "first a red circle", "id": str(i)} for i, r in enumerate(records)]
    solved.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def make(count: int, sources: dict[str, Path]) -> Path:
        folder = tmp_path_factory.mktemp(f"ranks{count}")
        code = RUN.format(jobs=prepared(sources, Path(finished.model.base), folder, solved))
        ended = ranks_of.run([code] * count)
        assert ended.codes == [0] * count, ended.said
        assert not any(ended.said[1:]), ended.said  # rank 0 alone speaks
        return folder

    return make


@pytest.fixture(scope="module")
def cases(finished, run_cases):
    """cases(count) -> the folder with the cases done by `count` ranks, once"""
    done: dict[int, Path] = {}

    def get(count: int) -> Path:
        if count not in done:
            sources = dict.fromkeys(CASES, Path(finished.output))
            sources |= {name: get(1) / name / "run" for name in PREPARED} if count > 1 else {}
            done[count] = run_cases(count, sources)
        return done[count]

    return get


@pytest.fixture(params=[2, 3])
def both(request, cases) -> tuple[Path, Path]:
    """(the cases of one process, of several ranks)"""
    return cases(1), cases(request.param)


def written(run: Path, *patterns: str) -> dict[str, bytes]:
    """The bytes of a run's files, without the path of the run."""
    found = [path for pattern in patterns for path in sorted(run.glob(pattern)) if path.name != "done.json"]
    return {str(path.relative_to(run)): path.read_bytes().replace(str(run).encode(), b"") for path in found}


def test_features_narratives_answers_and_judgements_have_the_same_bytes(both):
    patterns = ("features/*.json", "features/cache/*", "context/*captions*", "context/narratives.json")
    patterns += ("preference/p*", "preference/answers.jsonl", "preference/judgements.json", "preference/judged/*")
    one, several = (written(folder / "read" / "run", *patterns) for folder in both)
    assert len(one) > 40 and one.keys() == several.keys()
    assert [name for name in one if one[name] != several[name]] == []


def test_answers_of_dpo_and_of_the_evaluation_have_the_same_bytes(both):
    for case, patterns in (
        ("dpo", ("dpo/round1/answers.jsonl", "dpo/round1/judged.jsonl", "dpo/round1/pairs.jsonl")),
        ("vdpo", ("dpo/round1/pairs.jsonl", "dpo/round1/reference.jsonl", "dpo/round0/heldout/preferred.jsonl")),
        ("read", ("evaluate/*.jsonl", "evaluate/order/*.jsonl")),
    ):
        one, several = (written(folder / case / "run", *patterns) for folder in both)
        assert len(one) >= len(patterns) and one == several, case


def apart(one: Path, several: Path) -> float:
    """|difference| / |adapter|, over all tensors of a folder."""
    tensors = [(load_file(p), load_file(several / p.name)) for p in one.glob("*.safetensors")]
    pairs = [(a[key], b[key]) for a, b in tensors for key in a]
    size = sum(a.double().square().sum() for a, _ in pairs)
    return float((sum((a.double() - b.double()).square().sum() for a, b in pairs) / size).sqrt())


TRAINED = {
    "trained": ("sft", "reference", "reward", "policy", "value"),
    "pieces": ("reward",),
    **dict.fromkeys(("rules", "ranking", "dpo", "vdpo"), ("policy",)),
}


@pytest.mark.parametrize("case", TRAINED)
def test_adapters_are_those_of_one_process(both, case):
    for role in TRAINED[case]:
        one, several = (folder / case / "run" / "adapters" / role for folder in both)
        assert apart(one, several) < RELATIVE, role


@pytest.mark.parametrize("case", CASES)
def test_metrics_agree(both, case):
    one, several = (read_jsonl(folder / case / "run" / "metrics.jsonl") for folder in both)
    assert len(one) == len(several)
    for a, b in zip(one, several, strict=True):
        assert (a.pop("stage"), a.pop("step")) == (b.pop("stage"), b.pop("step"))
        a.pop("time"), b.pop("time")
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    if case == "rules":
        steps = [line for line in several if "rollout/resampled" in line]
        assert len(steps) == 2 and any(line["rollout/resampled"] > 0 for line in steps)
        assert all("order/bonus" in line for line in steps)


# ------------------------------------------------------------------------------------------------------------ trouble


@pytest.fixture
def again(finished, tmp_path):
    """again(*keys) -> (the recipe's file, its run folder: a copy of the finished one without PPO)"""

    def make(*keys: str) -> tuple[str, Path]:
        shutil.copytree(finished.output, tmp_path / "run", dirs_exist_ok=True)
        shutil.rmtree(tmp_path / "run" / "ppo")
        path = tmp_path / "recipe.yaml"
        path.write_text(dump_yaml(small_recipe(Path(finished.model.base), tmp_path, *keys)))
        return str(path), tmp_path / "run"

    return make


@pytest.mark.parametrize(("victim", "then"), [(0, 1), (1, 2)])
def test_a_killed_rank_is_named_and_any_number_of_ranks_goes_on(ranks_of, finished, cases, again, victim, then):
    """With as many ranks as before, to the same bits."""
    path, run = again()
    code = RUN.format(jobs=[(path, None, "ppo")])
    pids = ranks_of.start([code] * 2)
    until = time.monotonic() + 120
    while not (run / "ppo" / "checkpoint" / "checkpoint.safetensors").exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(pids[victim], signal.SIGKILL)
    killed = time.monotonic()
    ended = ranks_of.wait()
    assert time.monotonic() - killed < 30
    assert ended.codes[victim] == -signal.SIGKILL and ended.codes[1 - victim] not in (0, -signal.SIGKILL)
    said = ended.said[1 - victim]
    assert f"Rank {victim} of 2 (process {pids[victim]} on" in said and "is gone without a word" in said
    assert said.count("is gone") == 1 and "Traceback" not in said
    ended = ranks_of.run([code] * then)
    assert not any(ended.codes), ended.said
    assert "ppo: goes on where it was stopped" in ended.said[0]
    for role in ("policy", "value"):
        adapter = run / "adapters" / role
        assert apart(Path(finished.output) / "adapters" / role, adapter) < RELATIVE
        assert then == 1 or apart(cases(2) / "trained" / "run" / "adapters" / role, adapter) == 0.0


def test_memory_that_runs_out_on_one_rank_halves_the_micro_batch_on_all(ranks_of, finished, again):
    path, run = again()
    code = RUN.format(jobs=[(path, None, "ppo")])
    short = """
import torch
from rlaif_lite.stages.ppo import step
read, calls = step.answer_hidden, []
def tight(role, micro):
    calls.append(len(micro.index_b))
    if len(calls) in (3, 40) and len(micro.index_b) > 1:
        raise torch.OutOfMemoryError("made up")
    return read(role, micro)
step.answer_hidden = tight
"""
    ended = ranks_of.run([code, short + code])
    assert ended.codes == [0, 0], ended.said
    assert "out of memory at 4 a forward, done again at 2" in ended.said[0]
    for role in ("policy", "value"):
        assert apart(Path(finished.output) / "adapters" / role, run / "adapters" / role) < RELATIVE


def test_a_profile_has_the_all_reduce_as_a_phase(ranks_of, again):
    path, _ = again()
    code = f"""
import json
from rlaif_lite import profiler, ranks
from rlaif_lite.recipe import load_recipe
with ranks.joined():
    found = profiler.profile(load_recipe({path!r}), 1, ("reward",))
    if ranks.is_first():
        print(json.dumps(found))
"""
    ended = ranks_of.run([code] * 2)
    assert ended.codes == [0, 0], ended.said
    found = json.loads(ended.said[0].splitlines()[-1])
    phase = found["stages"]["reward"]["phases"]["all-reduce"]
    assert found["ranks"] == 2 and phase["calls"] == 1 and phase["seconds"] > 0 and phase["count"] > 1000


def refused(ended: Ended) -> str:
    """The one message, of rank 0."""
    assert all(code not in (0, 1) for code in ended.codes), ended
    assert ended.said[0].strip() and not any(said.strip() for said in ended.said[1:]), ended.said
    assert "Traceback" not in ended.said[0]
    return ended.said[0]


def test_ranks_that_differ_are_refused(ranks_of, again):
    path, _ = again()
    code = RUN.format(jobs=[(path, None, "data")])
    other = Path(path).with_name("other.yaml")
    other.write_text(Path(path).read_text().replace("seed: 3", "seed: 4", 1))
    said = refused(ranks_of.run([code, RUN.format(jobs=[(str(other), None, "data")])]))
    assert "the recipe differs on rank 1 from rank 0's. `seed` is 4 there, and 3 on rank 0" in said
    newer = "from rlaif_lite import pipeline\npipeline.code_digest = lambda: 'newer'\n"
    assert "the code of rlaif_lite differs on rank 2" in refused(ranks_of.run([code, code, newer + code]))
    blind = "from rlaif_lite import ranks\nsee = ranks.check_folder\nranks.check_folder = lambda f: see(f / 'no')\n"
    said = refused(ranks_of.run([code, blind + code]))
    assert f"rank 1 on {socket.gethostname()}: the run folder" in said
    missing = code.replace(path, "nowhere.yaml")
    assert "nowhere.yaml" in (said := refused(ranks_of.run([code, missing]))) and "Rank 1 of 2" in said


def test_ranks_divide_the_groups(ranks_of, again):
    path, _ = again("ppo.value=none", "ppo.baseline=group", "ppo.group_size=2")
    said = refused(ranks_of.run([RUN.format(jobs=[(path, None, "data")])] * 3))
    assert "3 ranks do not divide the 4 groups of a PPO step" in said and "multiple of 6" in said


def test_no_nccl_and_a_port_in_use_are_refused(ranks_of, again):
    path, _ = again()
    code = RUN.format(jobs=[(path, None, "data")])
    no_nccl = """
import torch
torch.cuda.is_available, torch.distributed.is_nccl_available = lambda: True, lambda: False
"""
    assert "has no NCCL" in refused(ranks_of.run([no_nccl + code] * 2))
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        quick = "from rlaif_lite.ranks import meeting\nmeeting.MEET_S = 3\n"
        ended = ranks_of.run([quick + code] * 2, port=port)
    assert all(code == 2 for code in ended.codes)
    assert f"Rank 0 of 2 cannot meet the others at 127.0.0.1:{port}" in ended.said[0]
    assert "Another program may hold the port" in ended.said[0]


def test_torchrun_starts_them(again):
    path, run = again()
    shutil.rmtree(run)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "rlaif_lite", "run", path, "--until", "features"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert read_json(run / "summary.json")["stages"]["features"]["ranks"] == 2
    assert done.stderr.count("features: reading: 32 videos") == 1


# ------------------------------------------------------------------------------------------------------------ dealing


@pytest.mark.parametrize(
    ("items", "fits", "lists", "longest"),
    [
        (0, 8, 0, 0),
        (3, 8, 1, 3),
        (15, 8, 1, 15),
        (17, 8, 2, 9),
        (100, 8, 12, 9),
        (384, 8, 12, 32),
        (385, 8, 24, 17),
        (5, 0, 5, 1),
    ],
)
def test_batches_are_even_and_know_nothing_of_the_ranks(items, fits, lists, longest):
    """8 fit at once, so a list has 8 to 32 items, if there are 8. 385 are more than 12 of 32: 24 lists of 16 or 17."""
    found = even_chunks(list(range(items)), fits)
    assert [item for part in found for item in part] == list(range(items))
    assert len(found) == lists and max(map(len, found), default=0) == longest


@pytest.mark.parametrize(("items", "count"), [(0, 2), (1, 3), (7, 2), (12, 3), (100, 8)])
def test_everything_is_dealt_once_and_evenly(items, count, monkeypatch):
    monkeypatch.setattr(WORLD, "count", count)
    size = lambda i: 1.0 + i
    hands = ranks.share(items, size)
    assert sorted(i for hand in hands for i in hand) == list(range(items))
    loads = [sum(map(size, hand)) for hand in hands]
    assert max(loads) - min(loads) <= items and max(map(len, hands)) - min(map(len, hands)) <= 1


def test_one_process_keeps_its_order():
    assert ranks.share(4, lambda i: -i) == [[0, 1, 2, 3]] and ranks.deal([3, 1, 2]) == [3, 1, 2]
    assert ranks.spread([1, 2], lambda own: [2 * i for i in own]) == [2, 4]
    assert ranks.totals({"a": 0.1}) == {"a": 0.1} and ranks.first(lambda: 5) == 5


def test_ranks_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert cores() == 8
    monkeypatch.setattr(WORLD, "here", 3)
    assert cores() == 2
    with alone():  # the others wait
        assert cores() == 8
    monkeypatch.setattr(WORLD, "here", 9)
    assert cores() == 1
