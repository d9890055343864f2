"""tokenizer.json with fewer tokens: what has to stay beside those that are wanted, and the file without the rest.

A text whose tokens all stay keeps them. WordPiece takes the longest token that fits: it is still there, and none is
new. Unigram takes the best path: it is still there, and unknown characters cost as before, as the least score stays.
BPE applies the first merge that fits: inside a token it applies those that it applies to the token alone, and all of
them stay, in their order, with all tokens that they pass through.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

from leap_dist.errors import UserError

KINDS = ("WordPiece", "BPE", "Unigram", "WordLevel")
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
RESERVED = re.compile(r"[<\[]\|?(unused|reserved)\D*\d+\|?[>\]]")
"""Special tokens that are free for a use that somebody may find: they stay only where a text uses them."""


class TokenizerJson:
    """The content of a tokenizer.json. ids: all tokens, the added ones too, with their ids."""

    def __init__(self, spec: dict[str, Any], source: str) -> None:
        """`source` names the tokenizer in messages. UserError for a kind that is not known, and for random merges."""
        self.spec, self.model = spec, spec["model"]
        self.kind = self.model.get("type")
        if self.kind not in KINDS:
            raise UserError(f"{source}: its tokenizer is {self.kind}; --vocabulary takes {', '.join(KINDS)}")
        if self.model.get("dropout"):
            raise UserError(f"{source}: its tokenizer merges at random (model.dropout); set it to null")
        vocab = self.model["vocab"]
        words = {word: number for number, (word, _) in enumerate(vocab)} if self.kind == "Unigram" else dict(vocab)
        self.words: dict[str, int] = words
        self.added: list[dict[str, Any]] = spec["added_tokens"]
        self.ids = words | {token["content"]: token["id"] for token in self.added}
        self.tokens = {number: word for word, number in self.ids.items()}

    @cached_property
    def special(self) -> set[int]:
        """Special tokens, those around texts, of padding, and in place of what the tokenizer does not know."""
        found = {token["id"] for token in self.added if token["special"] and not RESERVED.fullmatch(token["content"])}
        found |= self.framing
        if self.model.get("unk_token") in self.ids:
            found.add(self.ids[self.model["unk_token"]])
        if self.model.get("unk_id") is not None:
            found.add(self.model["unk_id"])
        if self.spec["padding"]:
            found.add(self.spec["padding"]["pad_id"])
        return found

    @cached_property
    def framing(self) -> set[int]:
        """What the tokenizer puts around texts."""
        found: list[int] = []
        _renumbered(self.spec["post_processor"], found.append)
        return set(found)

    @cached_property
    def bytes(self) -> set[int]:
        """The tokens of single bytes, of which any text can be made, as far as the tokenizer has them."""
        found = {number for word, number in self.words.items() if BYTE.fullmatch(word)}
        steps = (self.spec["normalizer"], self.spec["pre_tokenizer"])
        if any(part.get("type") == "ByteLevel" for step in steps for part in _objects(step)):
            from tokenizers.pre_tokenizers import ByteLevel

            found |= {self.words[symbol] for symbol in ByteLevel.alphabet() if symbol in self.words}
        return found

    @cached_property
    def cheapest(self) -> set[int]:
        """Of Unigram the token with the least score: from it follows what an unknown character costs."""
        if self.kind != "Unigram" or not self.words:
            return set()
        scores = [score for _, score in self.model["vocab"]]
        return {scores.index(min(scores))}

    @property
    def _prefix(self) -> str:
        """What marks a token inside a word."""
        return self.model.get("continuing_subword_prefix") or ""

    def characters(self, symbols: Iterable[str]) -> set[int]:
        """The tokens of single characters, alone and inside a word: new words of them are not unknown."""
        if self.kind not in ("WordPiece", "Unigram"):
            return set()  # BPE begins with them anyway
        forms = (form for symbol in symbols for form in (symbol, self._prefix + symbol))
        return {self.words[form] for form in forms if form in self.words}

    # ------------------------------------------------------------------------------------------ merges of BPE

    @cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        return {pair: rank for rank, pair in enumerate(map(_pair, self.model["merges"]))}

    def passed(self, number: int) -> set[int]:
        """What BPE's merges make on the way to a token, and begin with; empty for other kinds."""
        word = self.tokens[number]
        if self.kind != "BPE" or word not in self.words:
            return set()
        for symbols in self._beginnings(word):
            found = set(symbols)
            while (place := self._next_merge(symbols)) is not None:
                symbols[place : place + 2] = [self._merged(symbols[place], symbols[place + 1])]
                found.add(symbols[place])
            if symbols == [word]:
                return {self.words[symbol] for symbol in found}
        return set()  # met as a whole word alone (ignore_merges)

    def _beginnings(self, word: str) -> Iterator[list[str]]:
        """The characters of a token as BPE begins with them; a token that looks like one inside a word first."""
        prefix, suffix = self._prefix, self.model.get("end_of_word_suffix") or ""
        bodies = [(word.removeprefix(prefix), prefix)] if prefix and word.startswith(prefix) else []
        for body, first in [*bodies, (word, "")]:
            last = suffix if suffix and body.endswith(suffix) else ""
            letters = body.removesuffix(last)
            symbols = [(first if place == 0 else prefix) + letter for place, letter in enumerate(letters)]
            if symbols and all(symbol in self.words for symbol in [*symbols[:-1], symbols[-1] + last]):
                yield [*symbols[:-1], symbols[-1] + last]

    def _next_merge(self, symbols: Sequence[str]) -> int | None:
        """Where the first of all merges applies, the leftmost place; None where none does."""
        ranks = [
            (rank, place) for place, pair in enumerate(pairwise(symbols)) if (rank := self._ranks.get(pair)) is not None
        ]
        return min(ranks)[1] if ranks else None

    def _merged(self, left: str, right: str) -> str:
        return left + right[len(self._prefix) :]

    # ------------------------------------------------------------------------------------------ the file

    def without_others(self, kept: Sequence[int]) -> dict[str, Any]:
        """The content with the tokens `kept` (ids, ascending) alone, numbered from 0 in their order."""
        new = {number: place for place, number in enumerate(kept)}
        model = dict(self.model)
        if self.kind == "Unigram":
            model["vocab"] = [entry for number, entry in enumerate(model["vocab"]) if number in new]
            model["unk_id"] = None if model.get("unk_id") is None else new[model["unk_id"]]
        else:
            model["vocab"] = {word: new[number] for word, number in self.words.items() if number in new}
        if self.kind == "BPE":
            words = model["vocab"]
            model["merges"] = [
                merge
                for merge in model["merges"]
                if (pair := _pair(merge))[0] in words and pair[1] in words and self._merged(*pair) in words
            ]
        padding = self.spec["padding"]
        return self.spec | {
            "model": model,
            "added_tokens": [token | {"id": new[token["id"]]} for token in self.added if token["id"] in new],
            "post_processor": _renumbered(self.spec["post_processor"], new.__getitem__),
            "padding": padding and padding | {"pad_id": new[padding["pad_id"]]},
        }


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """A merge as older and newer files have it."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _objects(value: Any) -> Iterator[Mapping[str, Any]]:
    """All JSON objects in a value."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _objects(inner)


def _renumbered(value: Any, number: Callable[[int], Any]) -> Any:
    """A post-processor whose token ids are what `number` makes of them."""
    if isinstance(value, list):
        return [_renumbered(inner, number) for inner in value]
    if not isinstance(value, dict):
        return value
    changed = {}
    for key, inner in value.items():
        if key in ("sep", "cls"):
            changed[key] = [inner[0], number(inner[1])]
        elif key == "ids":
            changed[key] = [number(token) for token in inner]
        else:
            changed[key] = _renumbered(inner, number)
    return changed
