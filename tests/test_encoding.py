"""Text files are UTF-8 whatever the locale: no call leaves the encoding to it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "rlaif_lite"


def bare(source: str) -> list[int]:
    """Lines with an `open`, `read_text` or `write_text` that names no encoding and is no binary one."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        method = node.func.attr if isinstance(node.func, ast.Attribute) else None
        plain_open = isinstance(node.func, ast.Name) and node.func.id == "open"
        path_open = method == "open" and isinstance(node.func.value, ast.Name) and "path" in node.func.value.id
        if not (plain_open or path_open or method in ("read_text", "write_text", "fdopen")):
            continue
        texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        binary = any("b" in text and len(text) <= 3 for text in texts) and method not in ("read_text", "write_text")
        if not binary and "encoding" not in [keyword.arg for keyword in node.keywords]:
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_text_file_is_opened_in_the_encoding_of_the_locale(path):
    assert bare(path.read_text(encoding="utf-8")) == [], path


def test_the_reader_itself():
    assert bare("open(x)\nopen(x, 'w')\np.read_text()\np.write_text('b')\nos.fdopen(d, 'w')") == [1, 2, 3, 4, 5]
    assert bare("open(x, 'rb')\nopen(x, encoding='utf-8')\np.read_text(encoding='ascii')\nImage.open(x)") == []
