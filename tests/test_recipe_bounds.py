"""Recipes as no one means them: too large, too deep, mutated. Each is read or refused within two seconds, by a
message."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlaif_lite.errors import RecipeError
from rlaif_lite.recipe import check_files, load_recipe

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
BOMB = "a0: &a0 [1,1,1,1,1,1,1,1,1]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
PAIRS = "preference: {claims: {context_prefix: '%s'}}\n"


@pytest.mark.parametrize(
    "text, message",
    [
        (BOMB, r"More than 5000 values \(.*x.yaml:\d+\)"),
        ("data: " + "[" * 5000 + "]" * 5000, r"nested more than 20 deep \(.*x.yaml:2\)"),
        ("# comment\n" * 10**6, "at most 65536"),
        ("output: '" + "x" * 10**6 + "'\n", "at most 65536"),
        ("".join(f"key{i}: 1\n" for i in range(4900)), "more errors are not shown"),
        ('output: "a\\0b"\n', r"'\\x00' cannot be used in a recipe \(.*x.yaml:2\)"),
        ('output: "\\ud800"\n', r"cannot be used in a recipe \(.*x.yaml:2\)"),
        ("\noutput: a\0b\n", r"'\\x00' is not allowed \(.*x.yaml:3\)"),
        ("# caf\udce9\n", r"x.yaml:2 cannot be read as a text file: byte 0xe9 is not UTF-8"),
        ("seed: " + "9" * 60000 + "\n", "is not what its tag"),
        ("ppo: {steps: 1000000000000}\n", r"`ppo.steps` \(.*x.yaml:2\) is 1000000000000, more than any run"),
        ("ppo: {steps: 100000000, rollouts: 96}\n", "times 96 is above"),
        ("sft: {easy: {epochs: 1e300}}\n", "`sft.easy.epochs` .* more than any run can take"),
        (PAIRS % "{context!z}", r"`preference.claims.context_prefix` .* formats \{context\} with `!` or `:`"),
        (PAIRS % "{context:>999999999}", "formats {context} with"),
        (PAIRS % "{context.__class__}", "which nothing fills in"),
        ("output: 'runs/{name:>9999999}'\n", "`output` .* formats {name} with"),
        ("data: {rl: ['" + "p" * 50000 + "']}\n", "No path is longer"),
        ("data: {video_root: '~nobody_here/v'}\n", "is not a folder"),
    ],
)
def test_what_is_too_much_is_refused_at_once(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"name: x\n" + text.encode("utf-8", "surrogateescape"))
    began = time.process_time()
    with pytest.raises(RecipeError, match=message):
        check_files(load_recipe(path))
    assert time.process_time() - began < 2


@pytest.mark.parametrize("name", ["-", "/dev/stdin", "/dev/zero"])
def test_recipes_come_from_files(name):
    with pytest.raises(RecipeError, match="is not a regular file. Recipes are not read from standard input"):
        load_recipe(name)


def mutated(rng: random.Random) -> bytes:
    """A shipped recipe with a few of its bytes, lines or values changed."""
    data = rng.choice(SHIPPED).read_bytes()
    for _ in range(rng.randint(1, 5)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + data[at + rng.randrange(40) :]
        elif kind == 2:
            data = (
                data[:at]
                + rng.choice([b"{", b"[", b"*a", b"&a", b"!!x ", b": ", b"\n", b"'", b"\t", b"{x!r}"])
                + data[at:]
            )
        elif kind == 3:
            lines = data.splitlines(keepends=True)
            rng.shuffle(lines)
            data = b"".join(lines)
        elif kind == 4:
            data = data[:at] + data[rng.randrange(len(data) + 1) :]
        else:
            data = data.replace(rng.choice([b"1", b"0", b"2"]), rng.choice([b"-1", b"1e999", b"9" * 30, b"null"]))
        data = data or b"x"
    return data


@pytest.mark.parametrize("count", [150, pytest.param(3000, marks=pytest.mark.slow)])
def test_mutated_recipes_are_read_or_refused(tmp_path, count):
    rng, path = random.Random(count), tmp_path / "x.yaml"
    for number in range(count):
        path.write_bytes(mutated(rng))
        began = time.process_time()
        try:
            check_files(load_recipe(path))
        except RecipeError as error:
            assert str(error).strip(), number
        assert time.process_time() - began < 2, number


# ---- where shipped recipes are found


def python(folder: Path, environment: dict, *arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_shipped_recipes_are_found_from_another_folder(tmp_path):
    """By PYTHONPATH, by an editable install (a path file that names the checkout), and as pip lays out a wheel."""
    code = "from rlaif_lite.recipe import load_recipe; print(load_recipe('tiny').name)"
    paths = f"{ROOT}:{ROOT / 'kernels'}"
    plain = {"PATH": "", "HOME": str(tmp_path)}
    assert python(tmp_path, plain | {"PYTHONPATH": paths}, "-c", code) == "tiny\n"

    editable = tmp_path / "editable"
    editable.mkdir()
    (editable / "rlaif_lite.pth").write_text(f"{ROOT}\n{ROOT / 'kernels'}\n")
    added = f"import site; site.addsitedir({str(editable)!r}); "
    assert python(tmp_path, plain, "-c", added + code) == "tiny\n"

    site = tmp_path / "site"
    (site / "share" / "rlaif-lite").mkdir(parents=True)
    (site / "rlaif_lite").symlink_to(ROOT / "rlaif_lite")
    where = "from rlaif_lite.recipe import file; file.__file__ = {!r}; ".format(
        str(site / "lib" / "recipe" / "file.py")
    )
    (site / "share" / "rlaif-lite" / "recipes").symlink_to(ROOT / "recipes")
    assert python(tmp_path, plain | {"PYTHONPATH": paths}, "-c", where + code) == "tiny\n"


# ---- how fast the command line answers


def processor_seconds(*words: str) -> float:
    """The least of three runs, user and system."""
    code = (
        "import resource, subprocess, sys; subprocess.run([sys.executable, '-m', 'rlaif_lite.cli', *sys.argv[1:]],"
        "capture_output=True); used = resource.getrusage(resource.RUSAGE_CHILDREN); print(used.ru_utime + "
        "used.ru_stime)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True) for _ in range(3)
    ]
    return min(float(run.stdout) for run in runs)


def test_help_and_errors_come_at_once():
    """0.16 s and 0.29 s of processor time on two cores of an AMD EPYC."""
    assert processor_seconds("--help") < 0.5
    assert processor_seconds("run", "recipes/tiny.yaml", "ppo.stepz=3") < 1.5
    assert processor_seconds("plan", "recipes/tiny.yaml", "ppo.stepz=3") < 1.5
