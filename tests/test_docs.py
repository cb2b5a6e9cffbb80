"""The docs keep up with the code: docstrings, links, what README says, and the tested versions."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rlaif_lite import __version__

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def undocumented(source: str) -> list[str]:
    """Public functions and classes of a module that have no docstring; "module" where the module has none."""
    tree = ast.parse(source)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    without = [node.name for node in public if ast.get_docstring(node) is None]
    return without if ast.get_docstring(tree) else ["module", *without]


def test_every_public_function_and_class_has_a_docstring():
    files = [*(ROOT / "rlaif_lite").rglob("*.py"), *(ROOT / "kernels" / "rlaif_kernels").rglob("*.py")]
    found = {str(file.relative_to(ROOT)): undocumented(file.read_text(encoding="utf-8")) for file in files}
    assert len(found) > 100
    assert not {name: names for name, names in found.items() if names}


def test_a_function_without_docstring_is_found():
    assert undocumented('"""M."""\ndef f(): pass\ndef _g(): pass\nclass C:\n    "Yes."\n') == ["f"]
    assert undocumented("x = 1") == ["module"]


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    heads = re.findall(r"^#+ (.+)$", page, flags=re.M)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", head.lower())) for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_between_files_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in path or (ROOT / "docs" in page.parents and path.endswith("recipe_keys.md")):  # made by the build
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{page.name} links to {target}"


def test_readme_is_short_and_its_picture_comes_first():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150
    title, tagline, picture = [line for line in readme.splitlines() if line][:3]
    assert title == "# rlaif-lite" and "GPU" in tagline and picture.startswith("![")
    assert "Not yet tested on a GPU" in readme


def test_readme_names_commands_and_recipes_that_exist():
    from typer.main import get_command

    from rlaif_lite.cli import app

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    used = set(re.findall(r"rlaif-lite ([a-z]+)", readme)) - {"runs"}  # "rlaif-lite runs VLM-RLAIF" is a sentence
    commands = set(get_command(app).commands)
    assert used <= commands and len(commands - used) <= 2, (used - commands, commands - used)
    makes = set(re.findall(r"(?:^|`)make ([a-z-]+)", readme, flags=re.M))
    assert all(re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), flags=re.M) for name in makes)


def test_the_recipe_that_readme_builds_for_own_data_is_a_recipe(tmp_path, monkeypatch):
    """The command under "Your own videos", checked against the readers on the record that README shows."""
    import shlex

    from rlaif_lite.data.readers import read_records
    from rlaif_lite.recipe import check_files, load_recipe

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    record = re.search(r"```json\n(.+?)\n```", readme, flags=re.S)[1]
    command = re.search(r"^rlaif-lite run (qwen.+?[^\\])$", readme, flags=re.S | re.M)[1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos").mkdir()
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(record + "\n")
    name, *overrides = shlex.split(command.replace("\\\n", " "))
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", overrides)
    check_files(recipe)
    assert recipe.output == "runs/mine" and list(recipe.data.sft) == ["train.jsonl"] and not recipe.data.sft_easy
    (only,) = read_records(tmp_path / "test.jsonl").records
    assert only.messages[-1].content == "A man opens a door."


def test_the_constraints_pin_what_the_package_needs_and_nothing_local():
    lines = (ROOT / "constraints.txt").read_text().split()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line) for line in lines)  # no URL, path or +local
    pins = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines}
    assert not {"torch", "triton"} & set(pins)  # the Makefile pins torch, and torch its triton
    needs = [Requirement(line) for line in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"])]
    for need in needs:
        if need.name not in ("torch", "triton", "rlaif-lite"):
            assert need.specifier.contains(pins[canonicalize_name(need.name)], prereleases=True), str(need)


def test_citation_and_workflows_can_be_read_and_agree_with_the_project():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__ and citation["license"] == PROJECT["license"]
    assert "2402.03746" in citation["references"][0]["url"]
    for path in [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml"]:
        assert yaml.safe_load(path.read_text()), path
    matrix = yaml.safe_load((ROOT / ".github/workflows/checks.yml").read_text())["jobs"]["tests"]["strategy"]["matrix"]
    assert matrix["python"] == ["3.11", "3.12", "3.13"]
    ruff = next(d for d in (ROOT / "constraints.txt").read_text().split() if d.startswith("ruff=="))
    assert f"rev: v{ruff.removeprefix('ruff==')}" in (ROOT / ".pre-commit-config.yaml").read_text()
