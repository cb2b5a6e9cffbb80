"""What a server says, before it is shown or written: without secrets, in characters that a file can hold."""

import json
import re
import urllib.parse
from collections.abc import Sequence

SHOWN = 300  # characters of a server's words in a message


class Mask:
    """Makes a server's words fit to be shown: no secret in any spelling, one line, at most SHOWN characters."""

    def __init__(self, secrets: Sequence[str]):
        spelt = {
            spelling
            for secret in secrets
            if len(secret) > 2  # "1" in a query is a version, not a key
            for spelling in (
                secret,
                repr(secret)[1:-1],
                json.dumps(secret)[1:-1],
                urllib.parse.quote(secret, safe=""),
                urllib.parse.quote_plus(secret),
            )
        }
        longest_first = sorted(spelt, key=len, reverse=True)
        self._secret = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)", re.IGNORECASE)

    def __call__(self, said: str) -> str:
        """For messages, names and file names."""
        hidden = self.hide(whole(said))
        return " ".join("".join(c if c.isprintable() else " " for c in hidden).split())[:SHOWN]

    def hide(self, text: str) -> str:
        """The text without its secrets, and otherwise as it is."""
        return self._secret.sub("***", text)


def whole(text: str) -> str:
    """The text with a question mark for each half of a surrogate pair, which no file and no request can hold."""
    return text.encode("utf-8", "replace").decode()
