"""The one video of a record, from whichever field the format has for it.

A record has one video: a file, a folder of frames, or frames in order. A single picture is a video of one frame. What
would be several videos, a part of a video, sound, a link or bytes inside the file is refused with what to do instead.
"""

import os
from urllib.parse import urlsplit

from ...errors import DataError

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FIELDS = ("video", "videos", "image", "images", "video_path", "video_name", "video_filename", "path", "frame")
NOTHING = (None, "", [], ())


def video_of(found: dict, inside: list[tuple[str, str]] = (), marks: int = 0) -> str | tuple[str, ...] | None:
    """The video of a record with these fields. `inside`: (kind, path) of the parts of its typed content; `marks`: how
    many places its text marks. Raises DataError naming the field."""
    given = {key: found[key] for key in FIELDS if found.get(key) not in NOTHING}
    if len(given) > 1:
        listed = " and ".join(f"`{key}` ({str(value)[:60]})" for key, value in given.items())
        raise DataError(f"it has {listed}; a record has one video. Leave out what does not belong to it.")
    paths = [path for _, path in inside if path]
    if paths and given:
        (key,) = given
        outside = video_of(found)
        if [outside] != paths and outside != tuple(paths):
            raise DataError(f"its content names {paths[0]!r} and `{key}` names {given[key]!r}; a record has one video.")
        return outside
    if paths:
        if len(paths) > 1:
            raise _several("its content", len(paths))
        kind, path = next(part for part in inside if part[1])
        return (path,) if kind == "image" else path
    if not given:
        return None
    (key,) = given
    value = given[key]
    items = value if isinstance(value, list) else [value]
    if key in ("images", "image", "frame") or (key == "path" and found.get("data_type") == "image"):
        frames = tuple(path_of(item, key) for item in items)
        if len(frames) > 1 and marks > 1:
            raise _several(f"`{key}`", len(frames))
        return frames
    if key == "videos" and len(items) == 1 and isinstance(items[0], list):
        items = items[0]  # LLaMA-Factory: one video as a list of its frames
        return tuple(path_of(item, key) for item in items) if len(items) > 1 else path_of(items[0], key)
    if len(items) == 1:
        path = path_of(items[0], key)
        return (path,) if isinstance(value, list) and key == "video" and _is_picture(path) else path
    if key == "video" and all(isinstance(item, str) and _is_picture(item) for item in items):
        return tuple(path_of(item, key) for item in items)
    raise _several(f"`{key}`", len(items))


def path_of(value, key: str) -> str:
    """A path as a text, or as `{path, bytes}` of Hugging Face `datasets`. Raises DataError for a link and for bytes."""
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            raise DataError(f"`{key}` holds the file's bytes. Write them to a file, and its path into the data.")
        value = value.get("path") or value.get("url")
    if not isinstance(value, str) or not value:
        raise DataError(f"`{key}` is {value!r}, expected a path or a list of frame paths.")
    if "\0" in value:
        raise DataError(f"`{key}` is {value!r}, which holds a NUL character; no path has one.")
    scheme = value.partition(":")[0].lower() if ":" in value[:12] else ""
    if scheme == "file":
        return urlsplit(value).path
    if scheme in ("http", "https", "s3", "gs", "hf", "oss", "data"):
        raise DataError(f"`{key}` is {value[:80]!r}, a link and not a path. Download it, and give the path.")
    return value


def _is_picture(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in PICTURES


def _several(where: str, count: int) -> DataError:
    return DataError(
        f"{where} has {count} entries; a record has one video. Make one record of each, or join them into one video."
    )
