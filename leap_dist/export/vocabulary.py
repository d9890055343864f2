"""A model folder with the tokens that some texts use: tokenizer, embeddings and head lose all others.

What stays: the tokens of the texts and of their lines alone, or the most frequent of them; special tokens and those of
single bytes; what the tokenizer needs on the way to them (tokenizer_json.py). A text that uses kept tokens alone has
the same tokens, by other numbers, and the same logits; both are checked.
"""

from __future__ import annotations

import json
import string
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from leap_dist.errors import UserError
from leap_dist.export.hf import load_exported, load_exported_tokenizer, save_model
from leap_dist.export.tokenizer_json import TokenizerJson
from leap_dist.models.fewer_rows import named_ids, with_rows
from leap_dist.models.outputs import example_inputs, relative_difference, result_of
from leap_dist.models.padding import POSITIONS_FROM_PADDING
from leap_dist.tasks.base import tokenised
from leap_dist.tasks.documents import batches
from leap_dist.tasks.texts import texts_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEXT, SIZE, HELD_OUT = "--vocabulary", "--vocabulary-size", "--held-out"
TOLERANCE = 1e-5  # of the largest logit
CHECKED = ((1, 1), (1, 12), (3, 7))
"""(batch, length) of the random texts whose logits are compared."""
NAMES = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")


@dataclass(frozen=True)
class Wanted:
    """Files whose tokens stay; how many tokens stay at most (None: all of theirs); files whose tokens are counted."""

    texts: Sequence[Path]
    size: int | None = None
    held_out: Sequence[Path] = ()


def wanted_of(texts: Sequence[Path] | None, size: int | None, held_out: Sequence[Path] | None) -> Wanted | None:
    """What the command line asks for; None: all tokens stay. UserError for an option without the texts."""
    for option, given in ((SIZE, size), (HELD_OUT, held_out)):
        if given is not None and not texts:
            raise UserError(f"{option}: needs {TEXT} TEXT, the texts whose tokens stay")
    return Wanted(texts, size, held_out or ()) if texts else None


@dataclass(frozen=True)
class HeldOut:
    """A text's tokens, and those of them that are unknown, before and after."""

    text: str
    tokens: tuple[int, int]
    unknown: tuple[int, int]


@dataclass(frozen=True)
class Vocabulary:
    """What was kept of a vocabulary. Tokens are counted once: as used, else as special or byte, else as passed."""

    before: int
    after: int
    used: int
    special: int
    bytes: int
    passed: int
    texts: list[str]
    tokens_of_texts: int
    not_kept: float
    """The share of the texts' tokens that are among those that left."""
    rows_without_token: int
    difference: float
    held_out: list[HeldOut] = field(default_factory=list)

    def notes(self) -> list[str]:
        """For the card."""
        parts = ((self.used, "that the texts use"), (self.special, "special"), (self.bytes, "of single bytes"))
        named = [f"{number:,} {what}" for number, what in (*parts, (self.passed, "on the way to them")) if number]
        gone = f", of which {self.not_kept:.2%} are no longer there" if self.not_kept else ""
        found = [
            f"Vocabulary: {self.after:,} of {self.before:,} tokens: {', '.join(named)}. The texts "
            f"({', '.join(self.texts)}) have {self.tokens_of_texts:,} tokens{gone}."
        ]
        if self.rows_without_token:
            found.append(f"{self.rows_without_token:,} rows of the embeddings that no token had are gone.")
        for text in self.held_out:
            (before, after), (unknown, now) = text.tokens, text.unknown
            found.append(
                f"Held out: {text.text} takes {after:,} tokens in place of {before:,} ({after - before:+,}, "
                f"{after / before - 1:+.2%}); unknown: {unknown:,} → {now:,}."
            )
        return found


def cut_vocabulary(source: Path, folder: Path, wanted: Wanted) -> Vocabulary:
    """Write the model folder `source` with fewer tokens to `folder`. UserError, with nothing written, for a mistake.

    RuntimeError if what was written does not give the same tokens or logits.
    """
    _say("reading the texts")
    texts = [text for file in wanted.texts for text in texts_in(TEXT, file)]
    held_out = {file: texts_in(HELD_OUT, file) for file in wanted.held_out}
    _say("reading the tokenizer")
    tokenizer = _tokenizer_of(source)
    file = TokenizerJson(json.loads(tokenizer.backend_tokenizer.to_str()), str(source))
    lines = [line for text in texts if "\n" in text.strip() for line in text.splitlines() if line.strip()]
    _say("counting the tokens of the texts")
    both = list(dict.fromkeys([*texts, *lines]))
    counts, of_lines = (_count(_tokens(tokenizer, some), max(file.tokens)) for some in (texts, lines))
    _say("reading the model")
    model = load_exported(source, "auto")
    rows = getattr(model.config.get_text_config(), "vocab_size", None)
    if rows is None:
        raise UserError(f"{source}: a {model.config.model_type} model has no vocabulary; {TEXT} is for text models")
    _say("choosing tokens")
    special = _special(file, tokenizer, model)
    _check_sizes(source, file, rows, counts + of_lines)
    kept = _choose(file, counts + of_lines, {number for number in special if number < rows}, wanted.size)
    _say(f"keeping {len(kept):,} of {len(file.tokens):,} tokens")
    cut = with_rows(model, kept)
    save_model(cut, cut.named_parameters(), folder)
    _save_tokenizer(file, kept, tokenizer, folder)
    _say("comparing the tokens of the texts with those before")
    smaller = _tokenizer_of(folder)
    _check_tokens(source, file, kept, both, tokenizer, smaller)
    _say("comparing logits with those before")
    difference = _difference(model, load_exported(folder, "auto"), kept)
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"{source}: with fewer tokens its logits differ by {difference:.3g} of the largest, allowed {TOLERANCE:g}; "
            "it was not exported"
        )
    if held_out:
        _say("counting the tokens of the held-out texts")
    found = [_held_out(path, texts, tokenizer, smaller) for path, texts in held_out.items()]
    return _described(file, wanted, kept, (counts, of_lines), special, rows, difference, found)


def _described(
    file: TokenizerJson,
    wanted: Wanted,
    kept: Sequence[int],
    counts: tuple[np.ndarray, np.ndarray],
    special: set[int],
    rows: int,
    difference: float,
    held_out: list[HeldOut],
) -> Vocabulary:
    """counts: how often each id comes in the texts, and in their lines alone."""
    of_texts, of_lines = counts
    used = set(np.flatnonzero(of_texts + of_lines).tolist())
    sizes = [len(group & set(kept)) for group in (used, special - used, file.bytes - special - used)]
    return Vocabulary(
        before=len(file.tokens),
        after=len(kept),
        used=sizes[0],
        special=sizes[1],
        bytes=sizes[2],
        passed=len(kept) - sum(sizes),
        texts=[path.name for path in wanted.texts],
        tokens_of_texts=int(of_texts.sum()),
        not_kept=1 - float(of_texts[kept].sum() / of_texts.sum()),
        rows_without_token=max(rows - 1 - max(file.tokens), 0),
        difference=difference,
        held_out=held_out,
    )


def _say(text: str) -> None:
    print(f"vocabulary: {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------- which tokens stay


def _tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = load_exported_tokenizer(folder)
    if tokenizer is None:
        raise UserError(f"{folder}: has no tokenizer, whose tokens {TEXT} could choose from; save one there")
    if not tokenizer.is_fast:
        raise UserError(
            f"{folder}: its tokenizer ({type(tokenizer).__name__}) is written in Python and has no tokenizer.json; "
            f"{TEXT} takes a tokenizer of the tokenizers library: save its fast version there, if it has one"
        )
    return tokenizer


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[np.ndarray]:
    """The ids of each text, or of each part of a long one."""
    for batch in batches(texts) if texts else ():
        pieces = [piece for piece, _ in batch]
        for ids in tokenised(tokenizer, pieces, key=TEXT, add_special_tokens=False, verbose=False)["input_ids"]:
            yield np.array(ids, np.int64)


def _count(tokens: Iterator[np.ndarray], highest: int) -> np.ndarray:
    """How often each id comes, (highest + 1,)."""
    return np.bincount(np.concatenate([np.zeros(0, np.int64), *tokens]), minlength=highest + 1)


def _special(file: TokenizerJson, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> set[int]:
    """Ids that stay whatever the texts use: those with a part to play for the tokenizer or for the model."""
    named = {getattr(tokenizer, f"{name}_token_id") for name in NAMES} | named_ids(model)
    templates = tokenizer.chat_template or ""
    said = templates if isinstance(templates, str) else "".join(templates.values())
    spoken = {token["id"] for token in file.added if token["content"] in said}
    pad = model.config.pad_token_id
    if model.config.model_type in POSITIONS_FROM_PADDING and pad is not None:
        named |= set(range(pad + 1))  # positions are counted from its number, which has to stay
    return (file.special | spoken | named) & file.tokens.keys()


def _check_sizes(source: Path, file: TokenizerJson, rows: int, counts: np.ndarray) -> None:
    """UserError for a token that the model has no row for, if a text can lead to it."""
    words, used = set(file.words.values()), set(np.flatnonzero(counts).tolist())
    if lacking := sorted(number for number in words | used | file.framing if number >= rows):
        raise UserError(
            f"{source}: its tokenizer and its model disagree: token {file.tokens[lacking[0]]!r} has the id "
            f"{lacking[0]}, and the model has {rows} rows (vocab_size); use the tokenizer that came with the model"
        )


def _choose(file: TokenizerJson, counts: np.ndarray, special: set[int], size: int | None) -> list[int]:
    """The ids that stay, ascending; at most `size`. UserError where special and byte tokens alone are more."""
    kept = special | file.bytes | file.cheapest
    kept |= {number for other in kept for number in file.passed(other)}
    if size is not None and size < len(kept):
        raise UserError(
            f"{SIZE}: got {size}; allowed: at least {len(kept)}, the special tokens and those of single bytes"
        )
    by_frequency = [number for number in np.argsort(-counts, kind="stable").tolist() if counts[number]]
    own, ascii_too = (
        sorted(file.characters(symbols), key=lambda number: (-counts[number], number))
        for symbols in ({symbol for number in by_frequency for symbol in file.tokens[number]}, string.printable)
    )
    for number in [*own, *by_frequency, *ascii_too]:
        group = {number, *file.passed(number)} - kept
        if size is None or len(kept) + len(group) <= size:
            kept |= group
    return sorted(kept)


# ---------------------------------------------------------------------------------------------- what is written


def _save_tokenizer(file: TokenizerJson, kept: Sequence[int], tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The tokenizer's files, of which tokenizer.json and tokenizer_config.json know the kept tokens alone."""
    tokenizer.save_pretrained(folder)
    text = json.dumps(file.without_others(kept), ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text, "utf-8")
    path, stays = folder / "tokenizer_config.json", set(kept)
    left = {token["content"] for token in file.added if token["id"] not in stays}
    settings = _without(json.loads(path.read_text("utf-8")), left)
    settings.pop("added_tokens_decoder", None)  # by id; tokenizer.json has them too
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _without(value: Any, left: set[str]) -> Any:
    """Settings without the special tokens that left."""
    if isinstance(value, dict):
        return {key: _without(inner, left) for key, inner in value.items() if _content(inner) not in left}
    if isinstance(value, list):
        return [_without(inner, left) for inner in value if _content(inner) not in left]
    return value


def _content(value: Any) -> str | None:
    """The token that a setting names, as a text or as an object."""
    found = value.get("content") if isinstance(value, Mapping) else value
    return found if isinstance(found, str) else None


# ---------------------------------------------------------------------------------------------- what is checked


def _check_tokens(
    source: Path,
    file: TokenizerJson,
    kept: Sequence[int],
    texts: Sequence[str],
    before: PreTrainedTokenizerBase,
    after: PreTrainedTokenizerBase,
) -> None:
    """RuntimeError unless the kept tokens have their new numbers, and texts of them alone the same tokens."""
    names = after.convert_ids_to_tokens(list(range(len(kept))))
    if len(after) != len(kept) or names != [file.tokens[number] for number in kept]:
        raise UserError(
            f"{source}: its tokenizer ({type(before).__name__}) does not number its tokens by tokenizer.json alone, "
            f"and {TEXT} cannot renumber them; save it as a PreTrainedTokenizerFast"
        )
    old = np.array(kept)
    for expected, received in zip(_tokens(before, texts), _tokens(after, texts), strict=True):
        if np.isin(expected, old).all() and not np.array_equal(expected, old[received]):
            raise RuntimeError(
                f"{source}: with fewer tokens a text that uses them alone has others; nothing was exported"
            )


def _difference(whole: PreTrainedModel, cut: PreTrainedModel, kept: Sequence[int]) -> float:
    """The largest difference of logits over random texts of kept tokens, relative to the largest logit."""
    values, old = [], torch.tensor(kept)
    words = None if whole.get_output_embeddings() is None else old
    for batch, length in CHECKED:
        inputs = example_inputs(cut, batch, length)
        before = {key: old[value] if key.endswith("input_ids") else value for key, value in inputs.items()}
        values.append(relative_difference(result_of(whole, before, words), result_of(cut, inputs)))
    return float(np.max(values))  # max() would lose NaN


def _held_out(
    path: Path, texts: Sequence[str], before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase
) -> HeldOut:
    tokens, unknown = [], []
    for tokenizer in (before, after):
        ids = np.concatenate([*_tokens(tokenizer, texts)])
        tokens.append(len(ids))
        unknown.append(int((ids == tokenizer.unk_token_id).sum()) if tokenizer.unk_token_id is not None else 0)
    return HeldOut(path.name, (tokens[0], tokens[1]), (unknown[0], unknown[1]))
