"""Hooks of MkDocs: the pages that are made from the code whenever the site is built.

`index.md` is the README with its links turned to the site, `recipe_keys.md` the schema of a recipe, `api/*.md` the
docstrings, a page per package.
"""

import re
import sys
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
BLOB = "https://github.com/rlaif-lite/rlaif-lite/blob/main/"


def on_config(config):
    """Adds the API's pages to the navigation, and before them the pages that mkdocs.yml does not name."""
    named = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))
    more = [page for page in pages if page not in named]
    config.nav += [{"More": more}] if more else []
    config.nav.append({"API": [{name: f"api/{name}.md"} for name in packages()]})
    return config


def on_files(files, config):
    """Adds the pages that are made here."""
    made = {"index.md": home(), "recipe_keys.md": recipe_keys()}
    made |= {f"api/{name}.md": api(name, modules) for name, modules in packages().items()}
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


def home() -> str:
    """README for the site: links into docs/ are the site's own, links to other files lead to the repository."""

    def turned(link: re.Match) -> str:
        target = link[1]
        if "://" in target or target.startswith("#"):
            return f"]({target})"
        return f"]({target.removeprefix('docs/') if target.startswith('docs/') else BLOB + target})"

    return re.sub(r"\]\(([^)\s]+)\)", turned, (ROOT / "README.md").read_text(encoding="utf-8"))


def recipe_keys() -> str:
    """Every key of a recipe with default, type and help, a table per section."""
    from rlaif_lite.recipe import fields

    page = ["# Recipe keys\n\nWritten from the schema. `rlaif-lite recipes show` prints the same.\n"]
    head = "\n| key | default | type | |\n|---|---|---|---|"
    top = [(key, info) for key, info in fields().items() if "." not in key and not info.section]
    page.append(head + "".join(f"\n{row(key, info)}" for key, info in top))
    for key, info in fields().items():
        if info.section and "." not in key:
            inner = [(name, each) for name, each in fields().items() if name.startswith((f"{key}.", f"{key}["))]
            rows = "".join(f"\n{row(name, each)}" for name, each in inner)
            page.append(f"\n\n## `{key}`\n\n{info.help}.\n{head}{rows}")
    return "\n".join(page) + "\n"


def row(key: str, info) -> str:
    """One key as a row of a table."""
    cells = (
        f"`{key}`",
        f"`{info.default}`" if info.default else "",
        "section" if info.section else info.type,
        info.help,
    )
    return "| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", cell).replace("<", "&lt;") for cell in cells) + " |"


def packages() -> dict[str, list[str]]:
    """{package: its modules}; the modules at the top of rlaif_lite are the package `rlaif_lite`."""
    found: dict[str, list[str]] = {}
    for root in (ROOT, ROOT / "kernels"):
        for file in sorted(root.glob("rlaif_*/**/*.py")):
            name = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            page = ".".join(name.split(".")[:2]) if file.parent.parent != root else name.split(".")[0]
            found.setdefault(page, []).append(name)
    return found


def api(name: str, modules: list[str]) -> str:
    """The page of a package."""
    return f"# {name}\n\n" + "\n".join(f"::: {module}\n" for module in modules)
