"""Which option a reply names: by a letter or a number in the forms that models use, or by the option's own words.

    B   (B)   **B.**   b)   B. a dog   Caption B   Option 2   The answer is (B)   Not A. Thus: B

A letter counts where nothing else can be meant: "A dog" names no option. A reply that names several names none.
"""

import re

LETTERS = "ABCDEFGH"
NOUNS = r"(?:answer|option|choice|caption|sentence|description|candidate|information)"
LABEL = re.compile(rf"\s*(?:{NOUNS}\s+)?\(?([A-H]|[1-8])(?:[.):]+(?:\s+(.*))?|\s*$)", re.DOTALL | re.IGNORECASE)
FIRST = re.compile(r"\s*(?:\(([A-Ha-h])\)|([A-Ha-h])\)|([A-H])[.:]|([A-H])\s*$)")
ANSWER = re.compile(rf"\banswer(?:\s+is|\s*:)+\s*(?:{NOUNS}\s+)?\(?([A-H]|[1-8])\b", re.IGNORECASE)
NAMED = re.compile(rf"\b{NOUNS}(?:\s+is)?:?\s*\(?([A-Ha-h](?![\w'])(?!\s+[a-z])|[1-8]\b)", re.IGNORECASE)
ALONE = re.compile(r"(?<![\w'])(?:([B-H])(?![\w'])|(A)(?=[.):,]|\s*$))")
REJECTED = re.compile(rf"\bnot\s+(?:{NOUNS}\s+)?\(?[A-H1-8](?![\w'])\)?[.,]?", re.IGNORECASE)
MARKDOWN = re.compile(r"[*`]+|__+")


def label_of(reference: str) -> tuple[str, str] | None:
    """(letter, words) of an option such as `B`, `(B)`, `B. a dog` or `Option 2: a dog`; None for other texts."""
    found = LABEL.fullmatch(reference)
    if found is None or (found[1].islower() and not found[2]):
        return None
    if found[1].isdecimal() and not re.match(rf"\s*{NOUNS}", reference, re.IGNORECASE):  # "2" is an answer of its own
        return None
    return _letter(found[1]), found[2] or ""


def named_in(reply: str) -> str | None:
    """The letter of the option that a reply names; None where it names none, or several."""
    text = REJECTED.sub(" ", MARKDOWN.sub("", reply)).strip()
    if found := ANSWER.findall(text):
        return _letter(found[-1])
    if first := FIRST.match(text):
        return _letter(next(filter(None, first.groups())))
    for form in (NAMED, ALONE):
        names = {_letter("".join(name)) for name in form.findall(text)}
        if names:
            return names.pop() if len(names) == 1 else None
    return None


def _letter(name: str) -> str:
    """Options may be counted: 2 is B."""
    return LETTERS[int(name) - 1] if name.isdecimal() else name.upper()


def lettered(options: list[str]) -> list[str]:
    """`A. rain`, `B. kite`, ..."""
    return [f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False)]
