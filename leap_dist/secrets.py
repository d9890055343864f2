"""What must not be shown: passwords and tokens in addresses, headers and the environment.

An address is taken apart where it is known as one (`remember`); its secrets are left out of every text afterwards
(`hide_secrets`), however another library quotes it.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote, quote_plus, unquote, unquote_plus

HIDDEN = "***"
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]{0,40}://")
NAME = r"(?:token|password|passwd|pwd|secret|key|signature|credential|sig|auth)"
SECRET_NAME = re.compile(rf"{NAME}s?$|^{NAME}[-_.]|[-_.]{NAME}[-_.]|access_?key|api_?key|^x-amz-", re.IGNORECASE)
VARIABLE = re.compile(
    r"(?:^|_)(?:PASSWORD|PASSWD|TOKEN|SECRET|API_?KEY|ACCESS_KEY|SECRET_KEY|PRIVATE_KEY)(?:_ID)?$"
    r"|^(?:PGPASSWORD|MYSQL_PWD|SSHPASS)$|CONNECTION_STRING$"
)
"""Environment variables that hold a secret, by name."""
SETTING = re.compile(
    r"(?:^|[-_.])(?:password|passwd|pwd|secret|(?:api|access|private|secret)[-_]?key|(?:access|auth|api|hub|hf)[-_]token)$"
    r"|^(?:.*\.)?token$",
    re.IGNORECASE,
)
"""Keys of settings, ours and DeepSpeed's (comet.api_key), whose value is a secret; pad_token is none."""
QUOTED = re.compile(r"[\"']([\w.\-]+)[\"']\s*:\s*[\"']([^\"']+)")  # a setting in a text that may be no whole JSON
USER = re.compile(r"://(?:[^/@\s:\"']*:[^\s\"'<>]*|[^/@\s\"'<>]+)@")
PAIR = re.compile(r"([?&;])([^=?&;\s\"'<>]+)=([^&]*)")
PART = re.compile(r"(?:^|;)\s*([^=;]+)=([^;]+)")  # of "AccountName=a;AccountKey=b=="
QUERY = re.compile(
    rf"([?&;][^=&\s\"']*(?:{NAME}|access_?key|x-amz-)[^=&\s\"']*=)[^&\s\"'<>)]*[^&\s\"'<>),.;]",
    re.IGNORECASE,
)
HEADER = re.compile(
    r"((?:proxy-)?authorization[\"']?\s*[:=]\s*)(?:b?[\"'][^\"']*[\"']|(?:(?:basic|bearer|token)\s+)?[^\s,;\"']+)",
    re.IGNORECASE,
)
BEARER = re.compile(r"\b(bearer|basic)\s+[A-Za-z0-9._~+/=\-]{8,}", re.IGNORECASE)
KNOWN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bgh[opsu]_[A-Za-z0-9]{20,}")
"""Tokens that are known by how they begin: of the Hugging Face hub, of AWS, of GitHub."""
SHORT = 3  # characters; a shorter secret cannot be told from other words outside its address
WHOLE = 8  # characters; a shorter one is hidden where it stands as a word

_remembered: dict[str, None] = {}
"""Every form of every secret that was seen in this process."""


def remember(text: str) -> None:
    """Note the secrets of an address, or of settings in a text, so that `hide_secrets` finds them in any other text."""
    _remembered.update(dict.fromkeys(_secrets_of(text)))
    for key, secret in QUOTED.findall(text):
        remember_setting(key, secret)


def remember_setting(key: str, value: Any) -> None:
    """`remember`, where a key says that its whole value is a secret."""
    if _is_secret(key, value):
        _remembered.update(dict.fromkeys(_forms(str(value))))


def remember_all(value: Any) -> None:
    """`remember` for every text in nested settings."""
    if isinstance(value, str):
        remember(value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            remember_all(key)
            remember_all(inner)
            remember_setting(key, inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            remember_all(inner)


def hide_secrets(text: str) -> str:
    """A text in which user, password and tokens of every address, header and variable are left out."""
    if SCHEME.match(text) and "\n" not in text:
        text = _hide_in_address(text)
    for secret in sorted({*_remembered, *_environment()}, key=len, reverse=True):
        if secret in text:
            text = _without(text, secret)
    text = USER.sub(f"://{HIDDEN}@", QUERY.sub(rf"\1{HIDDEN}", text))
    return KNOWN.sub(HIDDEN, BEARER.sub(rf"\1 {HIDDEN}", HEADER.sub(rf"\1{HIDDEN}", text)))


def plain_address(uri: str) -> str:
    """An address without user, password and options."""
    scheme, _, rest = uri.partition("://")
    return f"{scheme}://{_split_user(rest)[1].partition('?')[0]}" if rest else uri


def unquoted(uri: str) -> str:
    """Characters of an address's user and password at which clients split it elsewhere than where they end.

    SQLAlchemy's `make_url` ends a password at the first "@" and asks DNS for what follows; urllib ends the host at
    "/", "?" or "#", and takes new lines and tabs out.
    """
    scheme, _, rest = uri.partition("://")
    splits = "/?#\\" if scheme.lower() in ("http", "https") else "@"
    found = {char for char in _split_user(rest)[0] if char in splits or not char.isprintable()}
    return "".join(sorted(found))


def must_quote(uri: str) -> str:
    """Why an address is refused, with what to write; "" where user and password can be read in one way.

    No part of it is shown but the scheme: what is password and what is not depends on who reads it.
    """
    if not (found := unquoted(uri)):
        return ""
    shown = json.dumps(f"{uri.partition('://')[0]}://{HIDDEN}")
    written = ", ".join(f"{quote(char, safe='')} for {char!r}" for char in found)
    return (
        f"got {shown}; its user or password holds {' '.join(map(repr, found))}, where a client "
        f"would end it and take the rest for a host; allowed: percent-encoded; write {written}"
    )


def hide_in(value: Any) -> Any:
    """Nested settings, with what `hide_secrets` leaves out of every text in them."""
    if isinstance(value, Mapping):
        return {key: HIDDEN if _is_secret(key, inner) else hide_in(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(hide_in, value))
    return hide_secrets(value) if isinstance(value, str) else value


# ---------------------------------------------------------------------------------------------- taking apart


def _is_secret(key: Any, value: Any) -> bool:
    """Whether a setting's value is a secret as a whole: a text, or a number as which a text was read."""
    named = isinstance(key, str) and SETTING.search(key) is not None
    return named and isinstance(value, str | int | float) and not isinstance(value, bool) and value != ""


def _split_user(rest: str) -> tuple[str, str]:
    """(user and password, host and what follows) of what comes after "://".

    A password may hold any character, though not every client takes it: of an address that can be read in two ways
    the longer one is the password.
    """
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in authority or (":" in authority and "@" in rest and not authority.startswith("[")):
        user, _, host = rest.rpartition("@")
        return user, host
    return "", rest


def _hide_in_address(address: str) -> str:
    address = PAIR.sub(lambda m: f"{m[1]}{m[2]}={HIDDEN}" if SECRET_NAME.search(m[2]) else m[0], address)
    scheme, _, rest = address.partition("://")
    user, host = _split_user(rest)
    return f"{scheme}://{HIDDEN}@{host}" if user else address


def _secrets_of(text: str) -> Iterator[str]:
    """The secrets of an address in all their forms."""
    found = SCHEME.search(text)
    if found is None:
        return
    rest = text[found.end() :]
    user, _ = _split_user(rest)
    name, colon, password = user.partition(":")
    if colon:
        yield from _forms(password, name)
        for part in re.split(r"[@/?#:]", password):  # a client that splits elsewhere takes a part for the host
            yield from _forms(part)
    elif len(name) >= WHOLE:
        yield from _forms(name, name)
    for query in {rest, unquote_plus(rest)}:
        for pair in PAIR.finditer(query):
            if SECRET_NAME.search(pair[2]):
                yield from _forms(pair[3])


def _forms(secret: str, user: str = "") -> Iterator[str]:
    """A secret as others write it: escaped for addresses, JSON, Python, HTML, alembic and HTTP headers."""
    for text in {secret, unquote(secret), unquote_plus(secret)}:
        if len(text) < SHORT:
            continue
        yield from (text, quote(text, safe=""), quote(text), quote(text, safe=" +"), quote_plus(text))
        yield from (json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1], repr(text)[1:-1])
        yield from (html.escape(text), html.escape(text, quote=False), text.replace("%", "%%"))
        yield repr(text.encode())[2:-1]
        for name in {user, unquote(user)}:
            yield base64.b64encode(f"{name}:{text}".encode()).decode()


def _environment() -> tuple[str, ...]:
    """The secrets in this process's environment."""
    user = os.environ.get("MLFLOW_TRACKING_USERNAME", "")
    found = [(name, os.environ.get(name, "")) for name in os.environ]  # `items` raises where a thread removes a name
    return _of_variables(user, tuple(pair for pair in found if VARIABLE.search(pair[0]) or SCHEME.match(pair[1])))


@lru_cache(maxsize=4)
def _of_variables(user: str, variables: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for name, value in variables:
        found |= dict.fromkeys(_forms(value, user) if VARIABLE.search(name) else _secrets_of(value))
        if name.endswith("CONNECTION_STRING"):
            for pair in PART.finditer(value):
                found |= dict.fromkeys(_forms(pair[2]) if SECRET_NAME.search(pair[1]) else ())
    return tuple(found)


def _without(text: str, secret: str) -> str:
    """A short secret is hidden where it stands as a word; it may be a part of other words."""
    if len(secret) >= WHOLE:
        return text.replace(secret, HIDDEN)
    left, right = ("(?<!\\w)" if secret[0].isalnum() else ""), ("(?!\\w)" if secret[-1].isalnum() else "")
    return re.sub(left + re.escape(secret) + right, HIDDEN, text)
