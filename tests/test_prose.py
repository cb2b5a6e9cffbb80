"""The Markdown that people read is plain: no sentence above 35 words, 18 in the mean of a page.

Code, tables, headings, comments and the targets of links are left out. `python tests/test_prose.py [FILE...]` lists the
longest sentences of each page.
"""

import re
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
LONGEST, MEAN = 35, 18

ABBREVIATIONS = r"(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<!\bcf)(?<!\bet al)(?<!\bFig)(?<!\bSec)(?<!\bEq)(?<!\bDr)(?<!\betc)"
END = re.compile(ABBREVIATIONS + r"""[.!?]["')\]*_]*\s+(?=["'(\[*_]*[A-Z0-9`])""")


def blocks(markdown: str) -> list[str]:
    """The running text of a page: one string per paragraph or list item, on one line, without markup."""
    text = re.sub(r"\A---\n.*?\n---\n", "", markdown, flags=re.S)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"^( *)(```+|~~~+).*?^\1\2 *$", "\n", text, flags=re.S | re.M)
    found, current, listed = [], [], False
    for line in [*text.splitlines(), ""]:
        bare = line.strip()
        item = re.match(r"\s*([-*+]|\d+[.)]) ", line)
        indented = line.startswith(("    ", "\t")) and not current and not listed and not item
        if item or not bare or indented or bare.startswith(("|", "#", "![", "[![", "!!!", "???", ":::", "$$", "---")):
            found.append(" ".join(current))
            current = []
            listed = bool(item) or (listed and (not bare or line.startswith(" ")))
            if item:
                current = [line[item.end() :].strip()]
        else:
            current.append(bare.removeprefix("> "))
    return [block for block in map(plain, found) if block]


def plain(block: str) -> str:
    """A block without link targets, images, tags and emphasis; inline code counts as one word."""
    block = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", block)
    block = re.sub(r"(`+)(?:.+?)\1", "`code`", block)
    block = re.sub(r"\[([^\]]*)\](?:\([^)]*\)|\[[^\]]*\])", r"[\1]", block)
    block = re.sub(r"https?://\S+|</?[a-zA-Z][^>]*>", "", block)
    return re.sub(r"\*\*|__", "", block).strip()


def sentences(markdown: str) -> list[str]:
    lines = "\n".join(END.sub(lambda end: end[0].strip() + "\n", block) for block in blocks(markdown))
    return [line.translate(str.maketrans("", "", "[]")) for line in lines.splitlines()]


def words(sentence: str) -> int:
    """Tokens with a letter or a digit in them: dashes and operators are none."""
    return sum(any(character.isalnum() for character in token) for token in sentence.split())


def complaints(markdown: str) -> list[str]:
    """What is wrong with a page, in words; empty for a plain one."""
    counted = [(words(sentence), sentence) for sentence in sentences(markdown)]
    found = [f"{count} words: {sentence}" for count, sentence in counted if count > LONGEST]
    whole = [count for count, _ in counted if count >= 3]  # a label is no sentence, and must not lower the mean
    if whole and statistics.mean(whole) > MEAN:
        found.append(f"{statistics.mean(whole):.1f} words in the mean of {len(whole)} sentences; at most {MEAN}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_is_written_in_short_sentences(page):
    found = complaints(page.read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


def test_a_long_sentence_and_a_long_mean_are_found():
    long = "This one goes on " + "and on " * 17 + "until it ends."
    assert complaints(long)[0] == f"{words(long)} words: {long}" and words(long) > LONGEST
    assert any("in the mean" in each for each in complaints("One two three " * 7 + "four.\n\n" + "a " * 20 + "b."))
    assert not complaints("A short sentence. Another short one follows it.")


def test_markup_is_no_prose_and_sentences_end_where_they_end():
    page = """# A heading that is not counted

Loss of `a.b c.d` at 0.5 is small, see Shi et al. Then [a link. Really](https://example.org/a.b) "ends." Next?
Yes.

- first item
  goes on
- second item: 3.5 GB. More.

| a table | that is not counted |
|---|---|

    indented code is not. Counted.

```
fenced code. Neither.
```
"""
    assert sentences(page) == [
        "Loss of `code` at 0.5 is small, see Shi et al. Then a link.",
        'Really "ends."',
        "Next?",
        "Yes.",
        "first item goes on",
        "second item: 3.5 GB.",
        "More.",
    ]


if __name__ == "__main__":
    for name in sys.argv[1:] or map(str, PAGES):
        ordered = sorted(((words(s), s) for s in sentences(Path(name).read_text(encoding="utf-8"))), reverse=True)
        whole = [count for count, _ in ordered if count >= 3]
        print(f"\n{name}: {len(whole)} sentences, mean {statistics.mean(whole or [0]):.1f}")
        print("\n".join(f"  {count} {sentence}" for count, sentence in ordered if count > LONGEST))
