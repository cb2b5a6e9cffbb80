"""From the name of a video in a data file to what lies on the disk."""

import os
from functools import cache, lru_cache

from .records import Record

SUFFIXES = (
    *(".mp4", ".webm", ".mkv", ".avi", ".mov", ".gif"),
    *(".m4v", ".3gp", ".flv", ".ts", ".wmv", ".mpg", ".mpeg", ".ogv", ".mts", ".m2ts"),
)


def with_videos(records: list[Record]) -> tuple[list[Record], list[Record]]:
    """Split `records` into those whose video (every frame of it) is on the disk and those where it is not."""
    names = lru_cache(maxsize=None)(_names_in)

    def there(path: str) -> bool:
        folder, name = os.path.split(os.path.normpath(path))
        return name in names(folder or ".")

    @cache
    def complete(video: str | tuple[str, ...] | None) -> bool:
        return video is None or all(there(path) for path in (video if isinstance(video, tuple) else (video,)))

    kept, missing = [], []
    for record in records:
        (kept if complete(record.video) else missing).append(record)
    return kept, missing


def _names_in(folder: str) -> set[str]:
    """Names in `folder`; one listing serves all frames in it. A folder counts only if something is in it."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if not entry.is_dir() or os.listdir(entry.path)}
    except OSError:
        return set()


def _listing(folder: str) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except OSError:
        return frozenset()


class VideoNames:
    """Turns the name of a video in a data file into a path. Equal names give one object: records share videos."""

    def __init__(self, roots: list[str]):
        self.roots = roots
        self.listing = cache(_listing)  # a name has many spellings: one look at each folder instead of one at each
        self.known: dict[str | tuple[str, ...], str | tuple[str, ...]] = {}

    def resolve(self, video: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        """Absolute names stay. A name not found becomes a path below the first root, for the list of missing videos."""
        if video is None:
            return None
        if video not in self.known:
            if isinstance(video, tuple):
                first = self._find(video[0], [video[0]])
                root = first.removesuffix(video[0])
                self.known[video] = tuple(os.path.join(root, frame) for frame in video)
            else:  # `video`, then a folder of frames or a file of a known suffix, with and without ActivityNet's `v_`
                stem, suffix = os.path.splitext(video)
                stem = stem if suffix.lower() in SUFFIXES else video
                folder, base = os.path.split(stem)
                stems = [stem, os.path.join(folder, base[2:] if base.startswith("v_") else "v_" + base)]
                self.known[video] = self._find(video, [video, *(s + end for s in stems for end in ("", *SUFFIXES))])
        return self.known[video]

    def _find(self, name: str, spellings: list[str]) -> str:
        for root in self.roots:
            for spelling in spellings:
                path = os.path.join(root, spelling)
                folder, base = os.path.split(os.path.normpath(path))
                if base in self.listing(folder or "."):
                    return path
        return os.path.join(self.roots[0], name)
