"""Which words of an English answer are nouns, for AMBER, whose authors count tagged nouns and no verbs.

The tagger is TextBlob's PatternTagger (the extra `amber`): its word list and rules are in the wheel, so nothing is
downloaded. The authors use NLTK's perceptron tagger. On 500 captions of LLaVA and MiniGPT-4 from POPE's repository, it
finds 97.3 % of the nouns of AMBER's vocabulary that NLTK's finds, and 97.8 % of what it finds NLTK's finds too ("sink"
is the word that it misses most). Both read "watch the dog train" as two nouns.
"""

from functools import cache

from ..errors import DataError

INSTALL = "AMBER's descriptions need a part-of-speech tagger: pip install 'rlaif-lite[amber]'"


@cache
def tagger():
    """Raises DataError, with the line that installs it, where the tagger is missing."""
    try:
        from textblob.taggers import PatternTagger
    except ImportError:
        raise DataError(INSTALL) from None
    return PatternTagger()


def tagged(answer: str) -> list[tuple[str, bool]]:
    """The words of `answer` in order and in lower case, and whether each is a noun."""
    words = [(word.lower(), tag.startswith("NN")) for word, tag in tagger().tag(answer.replace("’", "'"))]
    return [(word, is_noun) for word, is_noun in words if any(map(str.isalnum, word))]
