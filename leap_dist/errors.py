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
