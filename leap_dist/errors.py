"""Errors that are the user's to mend."""

import errno
import re
import sys
import traceback
from collections.abc import Sequence
from types import TracebackType

from leap_dist.secrets import hide_secrets

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves the cursor, colours, rings, or turns the direction of writing; a tab and a new line are none of it."""


UNUSABLE = {errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EROFS}
"""Of errors about a path that no code of ours asked for: the user gave it, and another one will do."""


class UserError(ValueError):
    """A mistake of the user: bad config, bad data, bad folder.

    Launch scripts print the message alone, on rank 0, and exit with code 2. The message names the dotted
    key or the path, the value received, what is allowed, and what to do. It shows addresses without their secrets,
    and control characters as escapes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(hide_secrets(message)))


def own_words(error: BaseException) -> str:
    """What an error of another library says, and what the errors behind it say, on one line."""
    said: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(said) < 4:
        words = " ".join(str(cause).split()) or type(cause).__name__
        if not any(words in earlier for earlier in said):
            said.append(words if len(words) <= 400 else f"{words[:400]}...")
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return ": ".join(said)


def few_of(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def printable(text: str) -> str:
    """A text that a terminal shows and does not obey: control characters as Python writes them."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def show_fault(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """For sys.excepthook: the traceback of a fault of ours, or the path that cannot be used, without secrets."""
    if isinstance(error, OSError) and error.errno in UNUSABLE and error.filename is not None:
        text = f"error: {error.filename}: {error.strerror}; give a path that can be used\n"
    else:
        text = "".join(traceback.format_exception(kind, error, trace))
    print(printable(hide_secrets(text)), end="", file=sys.stderr)
