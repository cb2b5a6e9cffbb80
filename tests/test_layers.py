"""Imports point down the floors of the design and never up; the kernels stand beside them; the command line starts
light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "rlaif_lite"
# From the top. A module imports from its own unit and from the floors below its own, not from its neighbours.
FLOORS = [
    {"__main__"},
    {"cli"},
    {"cli_recipes"},
    {"dryrun"},
    {"profiler", "sweep", "ui"},
    {"launchers"},
    {"pipeline", "chat", "doctor", "exchange", "benchmarks", "data_report"},
    {"stages", "planner"},
    {"workspace", "run_folder"},
    {"judge", "training"},
    {"rollout"},
    {"model"},
    {"rl", "video", "tiny"},
    {"data"},
    {"report"},
    {"recipe"},
    {"files"},
    {"progress"},
    {"ranks"},
    {"phases"},
    {"errors", "formats"},
    {"__init__"},
]
FLOOR = {unit: number for number, units in enumerate(FLOORS) for unit in units}


def imports(path: Path) -> list[str]:
    """Absolute names of everything a file imports, inside functions too; not what only a type checker reads."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    package = [part for part in path.relative_to(ROOT).with_suffix("").parts[:-1] if part != "kernels"]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            found += [f"{module}.{alias.name}" for alias in node.names]
    return found


def unit(name: str) -> str:
    """The top-level module or package of rlaif_lite that an absolute name belongs to."""
    part = (name.split(".") + ["__init__"])[1]
    return part if (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").exists() else "__init__"


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = unit(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for name in imports(path):
        if name.split(".")[0] != "rlaif_lite":
            continue
        other = unit(name)
        assert other == own or FLOOR[other] > FLOOR[own], (
            f"{own} (floor {FLOOR[own]}) imports {name} (floor {FLOOR[other]})"
        )


def test_an_upward_import_is_seen(tmp_path, monkeypatch):
    """The reader of imports itself: relative, absolute, inside a function, and not for type checkers only."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "rlaif_lite" / "rl" / "losses.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "from typing import TYPE_CHECKING\nfrom ..stages import ppo\nimport rlaif_lite.cli\nfrom . import shaping\n"
        "if TYPE_CHECKING:\n    from ..workspace import Workspace\ndef f():\n    from ..model.base import Base\n"
    )
    found = imports(path)
    assert {"rlaif_lite.stages.ppo", "rlaif_lite.cli", "rlaif_lite.rl.shaping", "rlaif_lite.model.base.Base"} <= set(
        found
    )
    assert not any("workspace" in name for name in found)
    assert (unit("rlaif_lite.stages.ppo"), unit("rlaif_lite.__version__")) == ("stages", "__init__")


def test_the_report_reads_run_folders_only():
    """It can be run on a folder from another machine: no torch, no transformers, nothing of this package but errors
    and formats."""
    allowed = {"numpy", "matplotlib", "jinja2", "markupsafe", "PIL"} | sys.stdlib_module_names
    for path in (PACKAGE / "report").glob("*.py"):
        for name in imports(path):
            first = name.split(".")[0]
            assert first in allowed or name.startswith(
                (
                    "rlaif_lite.report",
                    "rlaif_lite.errors",
                    "rlaif_lite.files",
                    "rlaif_lite.formats",
                    "rlaif_lite.__version__",
                )
            ), (path, name)


def test_the_toy_world_stays_behind_its_seams():
    """No stage knows the toy's grammar: `data.truth` says what is true, `data.world` makes videos and texts to
    learn."""
    for path in PACKAGE.rglob("*.py"):
        if path.parent != PACKAGE / "data":
            assert not any("world_text" in name.split(".") for name in imports(path)), path
    users = {
        str(path.relative_to(PACKAGE))
        for path in (PACKAGE / "stages").rglob("*.py")
        if any(module_of(name) == "rlaif_lite.data.world" for name in imports(path))
    }
    assert users == {"stages/data.py", "stages/dpo/judges.py"}


def test_the_embedded_base_is_made_from_the_world_alone():
    for path in (ROOT / "lab" / "embedded_base").glob("*.py"):
        used = {unit(name) for name in imports(path) if name.split(".")[0] == "rlaif_lite"}
        assert used <= {"data", "errors"}, (path, used)


def module_of(name: str) -> str | None:
    """The module of the checkout that an imported name lies in; None for other packages."""
    for start in (ROOT, ROOT / "kernels"):
        parts = name.split(".")
        while parts:
            path = start.joinpath(*parts)
            if path.with_suffix(".py").exists() or (path / "__init__.py").exists():
                return ".".join(parts)
            parts.pop()
    return None


def every_module() -> dict[str, Path]:
    roots = [(PACKAGE, ROOT), (ROOT / "lab", ROOT), (ROOT / "kernels" / "rlaif_kernels", ROOT / "kernels")]
    named = {}
    for folder, start in roots:
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(start).with_suffix("").parts
            named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def test_no_module_imports_itself_in_a_circle():
    """Package, lab and kernels, imports inside functions too. A package's own `__init__` may gather its modules."""
    graph = {}
    for name, path in every_module().items():
        used = {module_of(full) for full in imports(path)} - {None, name}
        graph[name] = {other for other in used if not name.startswith(f"{other}.")}
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in sorted(graph.get(name, ())):
                walk(other, (*trail, name))
            done.add(name)

    for name in graph:
        walk(name, ())


def test_the_laboratory_is_imported_by_nothing_that_ships():
    shipped = [*modules(), *(ROOT / "kernels").rglob("*.py")]
    for path in shipped:
        assert not any(name.split(".")[0] == "lab" for name in imports(path)), path


def test_the_kernels_stand_alone():
    """`kernels/` is a folder and no package: a package of that name would shadow Hugging Face's and break
    transformers."""
    assert not list((ROOT / "kernels").glob("__init__.py"))
    for path in (ROOT / "kernels" / "rlaif_kernels").rglob("*.py"):
        used = {name.split(".")[0] for name in imports(path)}
        assert used <= {"torch", "triton", "kernels", "rlaif_kernels"} | sys.stdlib_module_names, (path, used)
        assert not any(name.startswith("rlaif_lite") for name in imports(path)), path


def test_the_command_line_starts_without_torch():
    code = (
        "import rlaif_lite.cli, sys; print([m for m in ('torch', 'transformers', 'peft', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
