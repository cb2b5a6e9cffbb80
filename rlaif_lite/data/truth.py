"""What the truth says of an answer: the one place that knows it. Nothing is ever trained on it.

Three sources, in this order:

    a function    `evaluate.truth: module:function`, the user's own (see `Function`)
    the world     records of the synthetic world carry `facts` of its grammar (`world_text`)
    annotations   records carry `facts` with lists of texts, matched by their words (`Annotations`):
                  {"objects": ["dog", "frisbee"], "events": ["a dog catches a frisbee"], "statements": [...]}

What follows from it is the same for all: precision, recall, hallucination, the judge's agreement, the true score of
PPO's rollouts, and the alarm of reward hacking. Records without facts, and answers of which a function says None, have
no truth; figures are of the others.
"""

import importlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import getcwd
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError
from . import world_text
from .records import Record
from .world_text import Counts

TRUTH = ("evaluate.truth", "evaluate.synonyms")  # keys of the recipe: part of what a stage reads that measures with it
KINDS = ("objects", "events", "statements")  # of annotated facts
WORLD = {"events", "star"}  # keys of the world's facts
# Words that carry no fact: an answer need not repeat them.
STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an the is are was were be been being am do does did has have had of in on at to from by with for and or "
        "then there here it its this that these those as into onto while",
    )
)
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_]+(?:['’-][^\W_]+)*")  # Chinese and Japanese: by character
SENTENCE = re.compile(r"[^.!?;。！？；\n]+")
Function = Callable[[str, Record], Mapping[str, Any] | None]


class Finding(NamedTuple):
    """What is true and untrue in one answer."""

    counts: Counts
    wrong_words: list[tuple[int, int]]  # character spans that the truth contradicts

    @property
    def score(self) -> int:
        """Right minus wrong."""
        return self.counts.correct - self.counts.wrong


class Truth:
    """The truth about a run's videos.

    function: "module:function", or None. synonyms: a file with a line per object, its name first ("dog, puppy,
    hound"), as CHAIR has them, or None. records: those of the run; what any of them annotates can be said wrongly of
    the others. Raises DataError for a function or file that cannot be read, and for facts that are none.
    """

    def __init__(self, records: Iterable[Record] = (), function: str | None = None, synonyms: str | None = None):
        self._function = None if function is None else load_function(function)
        self._name = function
        records = list(records)
        if self._function is None:
            for record in records:
                check_facts(record)
        annotated = [r.facts for r in records if r.facts is not None and not is_world(r.facts)]
        self._annotations = Annotations(annotated if self._function is None else (), read_synonyms(synonyms))

    def of(self, answer: str, record: Record) -> Finding | None:
        """What is true of an answer to a record's question; None where that is not known. Raises DataError, naming the
        record, where the user's function fails."""
        if self._function is not None:
            place = f"`evaluate.truth: {self._name}`, {record.source or record.key}"
            try:
                said = self._function(answer, record)
            except Exception as error:
                raise DataError(f"{place}: the function failed on the answer {answer!r}: {error!r}.") from error
            return None if said is None else finding_of(said, place)
        if record.facts is None:
            return None
        if is_world(record.facts):
            labels = world_text.verdicts(answer, record.facts)
            spans = zip((match.span() for match in re.finditer(r"\S+", answer)), labels, strict=False)
            wrong = [span for span, label in spans if label == "no"]
            return Finding(world_text.truth(answer, record.facts), wrong)
        return self._annotations.of(answer, record.facts)

    def known(self, records: Iterable[Record]) -> int:
        """How many records have a truth; of a user's function all, as only an answer shows it."""
        return sum(self._function is not None or record.facts is not None for record in records)

    def score(self, answer: str, record: Record) -> int | None:
        """Right minus wrong facts of an answer: what judges are measured against."""
        finding = self.of(answer, record)
        return None if finding is None else finding.score

    def gap(self, record: Record, a: str, b: str) -> int | None:
        """By how much answer `a` is better than `b`."""
        scores = self.score(a, record), self.score(b, record)
        return None if None in scores else scores[0] - scores[1]

    def share_true(self, text: str, record: Record) -> float | None:
        """Share of a narrative's claims that are right (the world: of its clip captions); None where not known."""
        if self._function is None and record.facts is not None and is_world(record.facts):
            clips = enumerate(world_text.ORDINALS)
            right = [f"{ordinal} {world_text.caption(record.facts, clip)}" in text for clip, ordinal in clips]
            return sum(right) / len(right)
        finding = self.of(text, record)
        said = 0 if finding is None else finding.counts.correct + finding.counts.wrong
        return finding.counts.correct / said if said else None

    def describe(self, record: Record) -> str | None:
        """The facts in words, for the report."""
        facts = record.facts
        if facts is None:
            return None
        if is_world(facts):
            return world_text.describe(facts)
        listed = [", ".join(facts[kind]) for kind in KINDS if facts.get(kind) and _are_texts(facts[kind])]
        return ". ".join(listed) or None


# ---- the user's own function


def load_function(name: str, key: str = "evaluate.truth", takes: str = "answer, record") -> Callable:
    """The function that "module:function" names; modules are sought in the working directory too. Raises DataError,
    with the recipe's key and what the function takes."""
    module, _, attribute = name.partition(":")
    if getcwd() not in sys.path:
        sys.path.append(getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise DataError(
            f"`{key}: {name}` cannot be loaded ({error!r}). Write `module:function`; modules are sought in "
            f"{getcwd()} and on PYTHONPATH."
        ) from error
    if not callable(function):
        raise DataError(f"`{key}: {name}` is a {type(function).__name__}, no function ({takes}).")
    return function


def module_file(name: str, key: str = "evaluate.truth") -> str:
    """The file of the module that "module:function" names. Raises DataError."""
    load_function(name, key)
    return str(importlib.import_module(name.partition(":")[0]).__file__)


def finding_of(said: Mapping[str, Any], place: str) -> Finding:
    """What a user's function returned, checked. `correct`, `wrong` and `total` must be there; `mentions` (correct +
    wrong), `hallucinated` (wrong), `malformed` (None) and `wrong_words` ([]) may. Raises DataError naming `place`."""
    if not isinstance(said, Mapping):
        raise DataError(f"{place}: the function returned {said!r}, expected a dict or None.")
    if strange := sorted(set(map(str, said)) - {*Counts._fields, "wrong_words"}):
        raise DataError(f"{place}: the function returned `{strange[0]}`; known are {', '.join(Counts._fields)}.")
    if missing := [name for name in ("correct", "wrong", "total") if name not in said]:
        raise DataError(f"{place}: the function returned no `{missing[0]}`.")
    found = {"malformed": None, **said}
    spans = found.pop("wrong_words", [])
    for name, value in found.items():
        if not (type(value) is int and value >= 0 or name == "malformed" and value is None):
            raise DataError(f"{place}: the function returned `{name}` {value!r}, expected a whole number from 0.")
    found = {"mentions": found["correct"] + found["wrong"], "hallucinated": found["wrong"]} | found
    if found["hallucinated"] > found["mentions"]:
        raise DataError(f"{place}: {found['hallucinated']} objects are hallucinated of {found['mentions']} mentioned.")
    try:
        return Finding(Counts(**found), [(int(start), int(end)) for start, end in spans])
    except (TypeError, ValueError):
        raise DataError(f"{place}: `wrong_words` is {spans!r}, expected pairs of character offsets.") from None


# ---- facts that records carry


def is_world(facts: Mapping) -> bool:
    """Whether a record's facts have the keys of the synthetic world's."""
    return facts.keys() == WORLD


def check_facts(record: Record) -> None:
    """Raises DataError, naming where the record was read, for facts that are neither the world's nor annotated."""
    facts = record.facts
    if facts is None:
        return
    place = f"{record.source or record.id}: `facts`"
    if is_world(facts):
        pools = list(world_text.KINDS.values())
        events, star = facts["events"], facts["star"]
        right = isinstance(events, list) and len(events) == len(world_text.ORDINALS)
        right = right and all(_are_texts(e) and len(e) == len(pools) for e in events)
        right = right and all(word in pool for event in events for word, pool in zip(event, pools, strict=True))
        if not right or not (star is None or star in world_text.COLOURS):
            raise DataError(f"{place} are {facts!r}, which is no sheet of the synthetic world.")
        return
    if not facts or facts.keys() - set(KINDS):
        found = ", ".join(f"`{key}`" for key in facts) or "nothing"
        raise DataError(
            f"{place} hold {found}. Expected lists of texts under {', '.join(KINDS)}; facts of another form need a "
            "function of your own in `evaluate.truth`."
        )
    for kind, listed in facts.items():
        if not _are_texts(listed) or not all(words_of(text) for text in listed):
            raise DataError(f"{place}.{kind} is {listed!r}, expected a list of texts that have words.")
    if not any(facts.values()):
        raise DataError(f"{place} list nothing. Leave `facts` out where nothing is known.")


def _are_texts(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(text, str) for text in found)


# ---- annotated facts, by their words


def words_of(text: str) -> list[str]:
    """The words of a text, lower-case, English plurals as singulars."""
    return [_singular(match.group().lower()) for match in WORD.finditer(text)]


def content_words(text: str) -> frozenset[str]:
    """The words of a text that are no STOP_WORDS."""
    return frozenset(words_of(text)) - STOP_WORDS


def _singular(word: str) -> str:
    """A guess by the ending: "dogs" and "dog's" as "dog", "boxes" as "box", "ladies" as "lady"."""
    word = re.sub("['’]s?$", "", word)
    if len(word) > 4 and word.endswith("ies"):
        return f"{word[:-3]}y"
    if len(word) > 4 and word.endswith(("ses", "xes", "zes", "ches", "shes")):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def read_synonyms(path: str | None) -> dict[tuple[str, ...], str]:
    """{words: the object's name} of a file with a line per object: its name, then its synonyms, split by commas."""
    if path is None:
        return {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"`evaluate.synonyms`: {path} cannot be read as text ({error}).") from None
    named: dict[tuple[str, ...], str] = {}
    for line in lines:
        phrases = [tuple(words_of(part)) for part in line.split(",")]
        phrases = [phrase for phrase in phrases if phrase]
        for phrase in phrases:
            named.setdefault(phrase, " ".join(phrases[0]))
    return named


class _Word(NamedTuple):
    name: str  # the object's name where the words are in the list of synonyms, else the word
    start: int
    end: int


class Annotations:
    """Answers held against annotated facts by their words, as CHAIR does for objects (Rohrbach et al. 2018).

    An object is mentioned where its name or a synonym is. It is right where the record lists it, and hallucinated where
    only other records or the synonyms do. An event or statement is said where all its words but STOP_WORDS are in one
    sentence, in any order. One that only other records list is wrong unless all its words are of facts of this
    record. Every fact counts once in an answer. A negated mention is a mention, as in CHAIR.
    """

    def __init__(self, annotated: Iterable[Mapping[str, Sequence[str]]] = (), synonyms: Mapping | None = None):
        self.objects: dict[tuple[str, ...], str] = dict(synonyms or {})
        annotated = list(annotated)
        for facts in annotated:
            for name in facts.get("objects", ()):
                phrase = tuple(words_of(name))
                self.objects.setdefault(phrase, " ".join(phrase))
        self.longest = max(map(len, self.objects), default=1)
        said = {self._content(text) for facts in annotated for kind in KINDS[1:] for text in facts.get(kind, ())}
        often = Counter(word for content in said for word in content)
        self.by_rarest: dict[str, list[frozenset[str]]] = {}
        for content in sorted(said, key=sorted):
            self.by_rarest.setdefault(min(sorted(content), key=often.__getitem__), []).append(content)

    def of(self, answer: str, facts: Mapping[str, Sequence[str]]) -> Finding:
        """`facts`: lists of texts under KINDS, as one of the records given."""
        phrases = [tuple(words_of(name)) for name in facts.get("objects", ())]
        own_objects = {self.objects.get(phrase, " ".join(phrase)) for phrase in phrases}
        own = {self._content(text) for kind in KINDS[1:] for text in facts.get(kind, ())}
        own_words = frozenset().union(own_objects, *own)
        objects, said, spans = set(), set(), []
        names = set(self.objects.values())
        for sentence in SENTENCE.finditer(answer):
            words = self._words(sentence.group(), sentence.start())
            here = {word.name for word in words}
            for word in words if facts.get("objects") else ():
                if word.name in names:
                    objects.add(word.name)
                    spans += [(word.start, word.end)] * (word.name not in own_words)
            if own:
                near = [c for word in here for c in self.by_rarest.get(word, ()) if c <= here]
                foreign = [content for content in near if content not in own and not content <= own_words]
                said.update(content for content in near if content in own)
                said.update(foreign)
                strange = frozenset().union(*foreign) - own_words
                spans += [(word.start, word.end) for word in words if word.name in strange]
        hallucinated = {name for name in objects if name not in own_words}
        correct = len(objects & own_objects) + len(said & own)
        wrong = len(hallucinated) + len(said - own)
        mentions = len(objects) if facts.get("objects") else len(said)
        invented = len(hallucinated) if facts.get("objects") else len(said - own)
        counts = Counts(correct, wrong, len(own_objects) + len(own), mentions, invented, None)
        return Finding(counts, sorted(set(spans)))

    def _content(self, text: str) -> frozenset[str]:
        names = [word.name for word in self._words(text, 0)]
        return frozenset(name for name in names if name not in STOP_WORDS) or frozenset(names)

    def _words(self, text: str, offset: int) -> list[_Word]:
        """The words of a sentence; the longest run that names an object is one word with the object's name."""
        spans = [match.span() for match in WORD.finditer(text)]
        words, found, at = words_of(text), [], 0
        while at < len(words):
            sizes = range(min(self.longest, len(words) - at), 0, -1)
            size = next((n for n in sizes if tuple(words[at : at + n]) in self.objects), 1)
            run = tuple(words[at : at + size])
            name = self.objects.get(run, run[0])
            found.append(_Word(name, offset + spans[at][0], offset + spans[at + size - 1][1]))
            at += size
        return found
