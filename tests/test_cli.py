"""The command line through its front door: what it passes on, messages, exit codes, signals, and the doctor."""

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner

import rlaif_lite
from rlaif_lite import cli
from rlaif_lite.errors import StageError

ROOT = Path(__file__).parent.parent
RECIPE = """# A recipe for tests
name: a
sft: {easy: null, hard: null, policy_init: null}
data: {world: {}, preference: ['world:preference'], rl: ['world:rl'], test: ['world:test']}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("recipes/a.yaml").write_text(RECIPE)
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/recipe.yaml").write_text("name: a")
    Path("clip.mp4").write_bytes(b"")


@pytest.fixture
def calls(monkeypatch):
    """Stand-ins for the modules that do the work; they note what the command line asks of them."""
    noted = []

    def stand_in(parent, name, **functions):
        module = types.ModuleType(f"{parent.__name__}.{name}")
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(parent, name, module, raising=False)

    def note(name, answer=None):
        return lambda *args, **named: noted.append((name, *args, *named.items())) or answer

    from rlaif_lite import report

    stand_in(rlaif_lite, "pipeline", run=note("run", {}), evaluate_again=note("evaluate", {}))
    stand_in(rlaif_lite, "chat", main=note("chat"))
    stand_in(report, "page", write=note("report", Path("runs/a/report.html")))
    return noted


def command(*args):
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


# --------------------------------------------------------------------------------------------------- what is passed on


def test_run_passes_the_resolved_recipe(calls):
    result = command("run", "recipes/a.yaml", "ppo.kl_coef=0.5", "seed=3", "--until", "reward")
    assert result.exit_code == 0, result.output
    ((name, recipe, until, force),) = calls
    assert name == "run" and until == ("until", "reward") and force == ("force", False)
    assert (recipe.name, recipe.ppo.kl_coef, recipe.seed) == ("a", 0.5, 3)


def test_run_checks_files_before_it_starts(calls):
    result = command("run", "recipes/a.yaml", "data.rl=[nowhere.json]")
    assert result.exit_code == 2 and not calls
    assert "`data.rl[0]` (override `data.rl=[nowhere.json]`) names nowhere.json" in result.stderr


def test_the_other_commands_pass_on_their_arguments(calls):
    assert command("eval", "runs/a").exit_code == 0
    assert command("eval", "runs/a", "--best-of", "8").exit_code == 0
    assert command("report", "runs/a").stdout == "runs/a/report.html\n"
    assert command("chat", "runs/a", "clip.mp4", "--role", "sft", "--question", "what ?").exit_code == 0
    assert command("chat", "runs/a", "clip.mp4", "--best-of", "4").exit_code == 0
    run, video = Path("runs/a"), "clip.mp4"
    assert calls == [
        ("evaluate", run, None),
        ("evaluate", run, 8),
        ("report", run),
        ("chat", run, video, "sft", "what ?", None),
        ("chat", run, video, "policy", None, 4),
    ]


@pytest.mark.parametrize("args", [("eval", "run"), ("report", "run"), ("chat", "run", "clip.mp4")])
def test_a_folder_without_a_run_is_refused(calls, args):
    result = command(*args)
    assert result.exit_code == 2 and not calls
    assert "run is not a run folder: it holds no recipe.yaml. Runs at hand: runs/a." in result.stderr


def test_a_launcher_starts_no_command_of_one_process(calls, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(cli.app, ["report", "runs/a"])
    assert result.exit_code == 2 and calls == []
    assert "`rlaif-lite report` runs in one process. Start it without torchrun" in result.output


def test_chat_about_a_video_that_is_not_there(calls):
    result = command("chat", "runs/a", "clap.mp4")
    assert result.exit_code == 2 and not calls
    assert "There is no video clap.mp4" in result.stderr


# --------------------------------------------------------------------------------------------------------- how it ends


def ends_with(calls, monkeypatch, error):
    def run(recipe, until=None, force=False):
        raise error

    monkeypatch.setattr(rlaif_lite.pipeline, "run", run)
    return command("run", "recipes/a.yaml")


def test_our_errors_are_a_message_and_exit_2(calls, monkeypatch):
    result = ends_with(calls, monkeypatch, StageError("The floor was not reached."))
    assert (result.exit_code, result.stderr) == (2, "The floor was not reached.\n")


def test_other_errors_keep_their_traceback(calls, monkeypatch):
    result = ends_with(calls, monkeypatch, ZeroDivisionError("a defect"))
    assert isinstance(result.exception, ZeroDivisionError)


def test_only_run_promises_to_resume(calls, monkeypatch):
    result = ends_with(calls, monkeypatch, KeyboardInterrupt())
    assert result.exit_code == 130
    assert result.stderr == "\nStopped; what is done is kept: run the same command again.\n"

    def stop(run_dir, best_of):
        raise KeyboardInterrupt

    monkeypatch.setattr(rlaif_lite.pipeline, "evaluate_again", stop)
    result = command("eval", "runs/a")
    assert (result.exit_code, result.stderr) == (130, "\nStopped.\n")


SLEEPER = """
import signal, sys, time, types, multiprocessing
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started the tests in the background
import rlaif_lite
from rlaif_lite import cli
def run(recipe, until=None, force=False):
    if {pool}:
        with multiprocessing.get_context("fork").Pool(1) as pool:
            pool.map(abs, [1])
    try:
        print("started", flush=True)
        time.sleep(30)
    finally:
        print("cleaned up", flush=True)
rlaif_lite.pipeline = sys.modules["rlaif_lite.pipeline"] = types.SimpleNamespace(run=run)
sys.argv = ["rlaif-lite", "run", "recipes/a.yaml"]
cli.main()
"""


def environment():
    return os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_clean_up_and_leave_a_resumable_run(sent, code):
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER.format(pool=sent == signal.SIGTERM)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdout.readline() == "started\n"
    process.send_signal(sent)
    out, err = process.communicate(timeout=120)
    assert out == "cleaned up\n"
    # Nothing from the worker that the pool ended, too.
    assert err == "\nStopped; what is done is kept: run the same command again.\n"
    assert process.returncode == code


# ------------------------------------------------------------------------------------------------------- recipes, help


def test_help_needs_no_heavy_module():
    script = (
        "import sys; from rlaif_lite import cli\n"
        "try: cli.app(['--help'])\n"
        "except SystemExit: print([m for m in ('torch', 'transformers', 'numpy', 'pydantic') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment())
    assert result.stdout.rstrip().endswith("[]"), result.stdout + result.stderr
    assert all(name in result.stdout for name in ("run", "eval", "report", "chat", "doctor", "recipes"))


def test_recipes_list_check_show_schema():
    listed = command("recipes", "list").stdout.splitlines()
    assert listed[0].split(maxsplit=1) == ["recipes/a.yaml", "A recipe for tests"]
    assert "is fine: hash " in command("recipes", "check", "a").stdout
    assert "  kl_coef: 0.5\n" in command("recipes", "check", "recipes/a.yaml", "ppo.kl_coef=0.5", "--print").stdout
    assert "kl_coef: 0.1" in command("recipes", "show", "ppo").stdout
    assert json.loads(command("recipes", "schema").stdout)["required"] == ["name"]
    broken = command("recipes", "check", "recipes/a.yaml", "ppo.kl_cof=1")
    assert broken.exit_code == 2 and "Did you mean `ppo.kl_coef`?" in broken.stderr


def test_version():
    assert command("--version").stdout == f"{rlaif_lite.__version__}\n"


# -------------------------------------------------------------------------------------------------------------- doctor


@pytest.fixture(scope="module")
def findings():
    from rlaif_lite import doctor

    return doctor.examine()


def test_doctor_finds_this_machine_well(findings):
    assert findings["healthy"], findings
    assert findings["seconds"] < 20
    assert findings["trials"]["video decoding"]["detail"].startswith(("decord read", "pyav read"))
    assert {"torch", "transformers", "bitsandbytes", "pydantic"} <= set(findings["packages"])
    assert findings["cpu"]["cores"] >= 1 and findings["memory"]["ram_gib"] > 0.5
    assert any("runs here" in verdict for verdict in findings["recipes"].values())


def test_doctor_output_and_exit_code(findings, monkeypatch):
    from rlaif_lite import doctor

    monkeypatch.setattr(doctor, "examine", lambda: findings)
    text = command("doctor")
    assert text.exit_code == 0 and text.stdout.endswith("All is well.\n") and "4-bit weights" in text.stdout
    assert json.loads(command("doctor", "--json").stdout) == findings

    ill = json.loads(json.dumps(findings))
    ill["trials"]["4-bit weights"] = {"ok": False, "detail": "relative error cpu 0.25"}
    ill["healthy"] = False
    monkeypatch.setattr(doctor, "examine", lambda: ill)
    text = command("doctor")
    assert text.exit_code == 1 and "FAIL  4-bit weights" in text.stdout


def test_doctor_notices_wrong_parts(monkeypatch):
    """A dequantiser that shifts blocks, a decoder that returns one frame again and again, a package that is too old."""
    import bitsandbytes.functional as functional

    from rlaif_lite import doctor
    from rlaif_lite.video import workers

    right = functional.dequantize_4bit
    monkeypatch.setattr(functional, "dequantize_4bit", lambda *args: right(*args).roll(1, 0))
    assert not doctor.TRIALS["4-bit weights"]().ok

    decode_one = workers.decode_one

    def stuck(path, views, size):
        found = decode_one(path, views, size)
        return {name: f._replace(rgb_THWC=f.rgb_THWC[:1].repeat(len(f.time_T), 0)) for name, f in found.items()}

    monkeypatch.setattr(workers, "decode_one", stuck)
    assert not doctor.TRIALS["video decoding"]().ok

    monkeypatch.setattr(doctor.metadata, "version", lambda name: "1.0")
    assert not doctor._packages()["torch"]["ok"] and doctor._packages()["decord"]["ok"]

    def broken():
        raise OSError("no\n such file")

    assert doctor._try(broken) == (False, "OSError: no such file")


def test_doctor_sizes_recipes_by_their_names():
    from rlaif_lite import doctor

    for name in ("b_24gb", "b_80gb"):
        Path(f"recipes/{name}.yaml").touch()
    card = [{"memory_gib": 23.6}]  # what a card sold as 24 GB reports
    verdicts = doctor._recipes(card, 16.0)
    assert verdicts["recipes/b_24gb.yaml"] == "runs here" == verdicts["recipes/a.yaml"]
    assert verdicts["recipes/b_80gb.yaml"] == "needs a GPU with 80 GB"
    assert doctor._recipes([], 2.0)["recipes/a.yaml"] == "needs 4 GiB of memory"
