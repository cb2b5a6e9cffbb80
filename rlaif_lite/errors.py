"""Errors that a user can act on. Each message says what was found, where, and what to do.

The command line prints the message alone and exits with code 2; any other exception is a defect of ours and keeps its
traceback."""


class RlaifError(Exception):
    """Base of every error that is the input's fault, not the program's."""


class RecipeError(RlaifError):
    """A recipe that cannot be run: unknown key, wrong type, value out of range, missing file."""


class DataError(RlaifError):
    """A data file or record that cannot be read; names the file and the index."""


class VideoError(RlaifError):
    """A video that cannot be decoded; names the file and the reason the decoder gave."""


class ModelError(RlaifError):
    """A base model or adapter that cannot be used as asked."""


class StageError(RlaifError):
    """A stage that must not start or go on: a missing input, a floor not reached."""


class JudgeError(RlaifError):
    """A judge that cannot go on: its address does not answer, or it is not the judge that it was. Verdicts are kept."""
