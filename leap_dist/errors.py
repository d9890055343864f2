"""Errors that are the user's to mend."""


class UserError(ValueError):
    """A mistake of the user: bad config, bad data, bad folder.

    Launch scripts print the message alone, on rank 0, and exit with code 2. The message names the dotted
    key or the path, the value received, what is allowed, and what to do.
    """
