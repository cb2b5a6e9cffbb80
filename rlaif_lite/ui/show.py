"""What the page shows of items and pairs, as HTML. All text of data and models is escaped."""

from collections.abc import Sequence
from html import escape

from ..formats import number, percent, signed
from ..report.people import SOURCES, TIE, Item
from .media import Media
from .store import Shown, Store, claims_of

TITLES = {"policy": "The policy against SFT, held-out videos", "judged": "Pairs that the judge decided"}
COLUMNS = ("Record", "Margin", "Won, words", "Lost, words", "People", "Question", "Pair")
DISAGREE, LONGER, SHORTER = "people disagree", "the longer answer won", "the shorter answer won"


def item(shown: Shown, media: Media) -> str:
    """An item to judge: video, question, both answers."""
    cards = "".join(_card(f"Answer {place}", escape(text)) for place, text in enumerate(shown.answers, 1))
    return (
        f'<div class="item" data-item="{shown.item.id}">{media.element(shown.video)}'
        f'<h3>{escape(shown.question)}</h3><div class="two">{cards}</div></div>'
    )


def finished(done: int) -> str:
    """Instead of an item, when all are judged."""
    return f'<div class="item"><h3>All {done} items are judged. Thank you.</h3></div>'


def _card(title: str, inner: str) -> str:
    return f'<div class="answer"><b>{escape(title)}</b>{inner or "<i>(an empty answer)</i>"}</div>'


def rows(store: Store, least: float, only: Sequence[str]) -> list[list]:
    """The judged pairs as rows of COLUMNS whose margin is at least `least`; `only`: of DISAGREE, LONGER, SHORTER."""
    found = []
    for pair in store.of("judged"):
        chosen, rejected = (len(answer.split()) for answer in pair.answers)
        said = list(store.verdicts(pair).values())
        keep = pair.row["margin"] >= least
        keep &= DISAGREE not in only or said.count("rejected") > said.count("chosen")
        keep &= LONGER not in only or chosen > rejected
        keep &= SHORTER not in only or chosen < rejected
        if keep:
            people = ", ".join(f"{said.count(word)} {word}" for word in (*SOURCES["judged"], TIE) if word in said)
            question = store.show("", pair).question
            margin = float(f"{pair.row['margin']:.4g}")
            found.append([pair.key, margin, chosen, rejected, people, question, pair.id])
    return sorted(found, key=lambda row: -row[1])


def pair(store: Store, item: Item, media: Media) -> str:
    """What the judge said of a pair, and why."""
    shown = store.show("", item)
    cards = [
        _card(title, _claims(said) if said else escape(answer))
        for title, answer, said in zip(
            ("Chosen by the judge", "Rejected"), item.answers, claims_of(store, item), strict=True
        )
    ]
    people = "; ".join(f"{escape(name)}: {escape(said)}" for name, said in store.verdicts(item).items())
    record = store.records.get(item.key)
    narrative = None if record is None else store.narratives.get(store.work.name_of(record))
    consistent = "" if item.row.get("consistent", True) else " The two orders of the answers gave different winners."
    return (
        f'<div class="item">{media.element(shown.video)}<h3>{escape(shown.question)}</h3>'
        f'<div class="two">{"".join(cards)}</div>'
        f'<p class="note">Margin {signed(item.row["margin"], 2)}.{consistent} The share after a claim is the judge’s '
        f"P(yes). P(no) is given where the two do not make 100 %. People: {people or 'nobody yet'}.</p>"
        f'<p class="note"><b>Narrative the judge could read:</b> {escape(narrative or "none")}</p></div>'
    )


def _claims(said: Sequence[tuple[str, float, float]]) -> str:
    """Claims on green where the judge says yes, on red where it says no, paler where it is unsure."""
    parts = []
    for claim, yes, no in said:
        sure = (yes - no) / max(yes + no, 1e-9)
        colour = f"rgba({'15,118,110' if sure > 0 else '180,35,24'},{0.08 + 0.3 * abs(sure):.2f})"
        rest = "" if yes + no > 0.99 else f", no {percent(no)}"
        parts.append(f'<mark style="background:{colour}">{escape(claim)} <small>{percent(yes)}{rest}</small></mark>')
    return " ".join(parts)


def answers(pairs: Sequence[tuple[str, str]], seconds: float) -> str:
    """Two roles' answers side by side."""
    cards = "".join(_card(role, escape(text)) for role, text in pairs)
    return f'<div class="item"><div class="two">{cards}</div><p class="note">{number(seconds, 1)} s</p></div>'
