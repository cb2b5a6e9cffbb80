"""What is installed: both packages, the shipped base, the report's template, and no package called `kernels`."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: a build leaves folders behind."""
    pytest.importorskip("setuptools", reason="it builds the wheel")
    folder = tmp_path_factory.mktemp("package")
    leave = shutil.ignore_patterns(
        ".git", ".venv", "runs", "build", "dist", "*.egg-info", "__pycache__", ".pytest_cache", ".hypothesis"
    )
    shutil.copytree(ROOT, folder / "source", ignore=leave)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--disable-pip-version-check",
        "--quiet",
        "--wheel-dir",
        str(folder),
        str(folder / "source"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_what_it_needs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith("METADATA")]
        requires = archive.read(metadata).decode()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name and ".data/" not in name}
    assert tops == {"rlaif_lite", "rlaif_kernels"}
    assert {
        "rlaif_lite/cli.py",
        "rlaif_lite/stages/ppo/step.py",
        "rlaif_lite/model/base.py",
        "rlaif_kernels/linear_logprob.py",
        "rlaif_lite/report/page.html.jinja",
        "rlaif_lite/exchange/card.md.jinja",
        "rlaif_lite/ui/page.css",
        "rlaif_lite/ui/keys.js",
        "rlaif_lite/tiny/base/config.json",
        "rlaif_lite/tiny/base/model.safetensors",
        "rlaif_lite/tiny/base/tokenizer.json",
        "rlaif_lite/tiny/base/chat_template.jinja",
        "rlaif_lite/tiny/base/preprocessor_config.json",
        "rlaif_lite/tiny/base/README.md",
        "rlaif_lite/py.typed",
        "rlaif_kernels/py.typed",
        "rlaif_lite/tiny/base_weak/model.safetensors",
        "rlaif_lite/tiny/base_weak/README.md",
    } <= set(names)
    assert any(name.endswith(".data/data/share/rlaif-lite/recipes/tiny.yaml") for name in names)
    own = {path.relative_to(ROOT).as_posix() for path in (ROOT / "rlaif_lite").rglob("*.py")}
    own |= {
        path.relative_to(ROOT / "kernels").as_posix() for path in (ROOT / "kernels" / "rlaif_kernels").rglob("*.py")
    }
    assert own <= set(names)
    assert not any(name.endswith((".pyc", ".pt", ".bin", ".pkl")) or "test" in name.split("/")[-1] for name in names)
    assert "Requires-Dist: torch" in requires and "License-Expression: Apache-2.0" in requires
    assert sum(info.file_size for info in zipfile.ZipFile(wheel).infolist()) < 20e6


def test_the_wheel_works_away_from_the_repository(wheel, tmp_path):
    """Unpacked elsewhere: the command line answers, the embedded base is there."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "from pathlib import Path; import rlaif_lite, rlaif_kernels;"
        "from rlaif_lite.model.base import resolve_base;"
        "print(rlaif_lite.__file__, rlaif_kernels.__file__, (Path(resolve_base('embedded')) / "
        "'model.safetensors').is_file())"
    )
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    (tmp_path / "away").mkdir()

    def python(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path / "away", env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    lite, kernels, base = python("-c", code).split()
    assert lite.startswith(str(tmp_path / "site")) and kernels.startswith(str(tmp_path / "site")) and base == "True"
    assert "kl_coef:" in python("-m", "rlaif_lite.cli", "recipes", "show", "ppo")
