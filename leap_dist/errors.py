"""Errors that are the user's to mend."""

import re

USER = re.compile(r"://(?:[^/@\s:]*:[^@\s]*|[^/@\s]+)@")
TOKEN = re.compile(
    r"([?&][^=&\s]*(?:token|password|passwd|pwd|secret|key|signature)[^=&\s]*=)[^&\s\"',;)]+", re.IGNORECASE
)


class UserError(ValueError):
    """A mistake of the user: bad config, bad data, bad folder.

    Launch scripts print the message alone, on rank 0, and exit with code 2. The message names the dotted
    key or the path, the value received, what is allowed, and what to do. It shows addresses without their secrets.
    """

    def __init__(self, message: str) -> None:
        super().__init__(hide_secrets(message))


def hide_secrets(text: str) -> str:
    """A text with user, password and tokens of every address in it left out."""
    return TOKEN.sub(r"\1***", USER.sub("://***@", text))


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
