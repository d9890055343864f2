"""What a language model reads: documents of plain text, all their tokens in one stream, or conversations.

A text file is a document, and so is every row of a table or of a hub dataset. Each is tokenised as a whole, so that
its tokens are those that the tokenizer alone would give, and is followed by what ends a text. A row that has messages,
or a prompt and an answer, is a conversation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from leap_dist.config.sections import TEXT_ENDINGS, DataConfig, names_files
from leap_dist.errors import UserError
from leap_dist.tasks.base import tokenised
from leap_dist.tasks.cache import Arrays, cached
from leap_dist.tasks.chats import TOOLS, Conversation, conversation
from leap_dist.tasks.files import PARQUET, files_of, kind_of, read_text
from leap_dist.tasks.tables import TABLES, cell, cell_text, guarded, hub_split, hub_stream, read_rows, split_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZE_CHARACTERS = 2**24
"""Text that the tokenizer sees at once, which bounds the memory of its answer. Longer documents are cut at a line."""
PLAIN = (*TEXT_ENDINGS, "")
"""Endings of files that are one text; a name may have none."""
TEXT = ("text",)
CHATS = (
    ("messages",),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "input", "output"),
)
"""Columns of conversations, the first that are there: messages, or a prompt and an answer; a row may lack an input."""


@dataclass
class Split:
    """The documents or the conversations of train or of validation; `source`: where they are from."""

    source: str
    documents: list[str] = field(default_factory=list)
    chats: list[Conversation] = field(default_factory=list)


@dataclass(frozen=True)
class Frame:
    """Special tokens: before and after every block, and at the end of every document."""

    before: list[int]
    after: list[int]
    end: list[int]


def frame_of(tokenizer: PreTrainedTokenizerBase, masked: bool) -> Frame:
    """As the tokenizer starts and ends a text; one that ends none ends documents with its EOS token, if it has one."""
    before, after = _around(tokenizer)
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return Frame(before, after if masked else [], after or eos)


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens before and after a text, whichever words the tokenizer knows."""
    from tokenizers import Tokenizer, models

    if tokenizer.is_fast:
        framed = Tokenizer(models.WordLevel({"a": 0})).encode("a")
        if (processor := tokenizer.backend_tokenizer.post_processor) is not None:
            framed = processor.process(framed)
        ids, special = framed.ids, framed.special_tokens_mask
    else:
        ids = tokenizer.build_inputs_with_special_tokens([-1])
        special = [int(token != -1) for token in ids]
    if 0 not in special:
        raise UserError(
            "data.tokenizer: the post_processor of its tokenizer.json leaves the text out; allowed: one that has $A"
        )
    at = special.index(0)
    return ids[:at], ids[at + 1 :]


def read_split(key: str, data: DataConfig, splits: Any) -> Split:
    """All of `key`, data.train or data.validation; documents of white space alone are left out.

    splits: of data.dataset, None where there is none.
    """
    names = (data.train if key == "data.train" else data.validation) or ()
    if data.dataset and not names_files(names):
        split = dict(split_names(data))[key]
        found = Split(f"{data.dataset} {split}")
        held = hub_stream(key, data, split) if splits is None else hub_split(splits, key, split)
        rows = enumerate(guarded(key, held), start=1)
        _add_rows(found, ((f"{found.source}: row {number}", row) for number, row in rows), data, arrow=True)
    else:
        found = Split(f"{key}: {', '.join(names)}")
        for file in files_of(key, names):
            if kind_of(file) in TABLES:
                columns = {TOOLS, *(data.text or chain(TEXT, *CHATS))}
                _add_rows(found, read_rows(key, file, columns), data, arrow=kind_of(file) == PARQUET)
            elif data.text is not None:
                raise UserError(
                    f"data.text: got {', '.join(data.text)}, but {file} is plain text and has no columns: remove it"
                )
            else:
                found.documents.append(read_document(key, file))
    found.documents = [text for text in found.documents if text.strip()]
    if found.documents and found.chats:
        raise UserError(f"{found.source}: texts and conversations ({found.chats[0].place}); allowed: one of both")
    if not found.documents and not found.chats:
        raise UserError(f"{found.source}: no text in it")
    return found


def read_document(key: str, file: Path) -> str:
    """A file of plain text; `key` is the setting that names it.

    UserError for a file that may be rows: of an ending that says nothing, or of JSON, whose brackets would be learned.
    """
    text = read_text(key, file)
    if kind_of(file) not in PLAIN:
        texts, rows = ", ".join(filter(None, PLAIN)), ", ".join(TABLES)
        raise UserError(
            f"{key}: got {file}; allowed: text in a file that ends in {texts} or has no ending, rows in one that ends "
            f"in {rows}, packed or not; rename it by what it holds"
        )
    if _begins_with_json(text):
        raise UserError(
            f"{key}: {file}: begins with a JSON object, and its name says plain text; allowed: rows in a file that "
            "ends in .jsonl (one object a line) or .json (one list of objects); rename it"
        )
    return text


def _begins_with_json(text: str) -> bool:
    """Whether a JSON object, or a list of some, stands at the start of a text, and no words behind it on its line."""
    found = re.match(r"\s*(?=[{\[])", text)
    if found is None:
        return False
    try:
        value, stop = json.JSONDecoder().raw_decode(text, found.end())
    except (ValueError, RecursionError):
        return False
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and re.match(r"[ \t,]*(\n|\{|$)", text[stop:]) is not None


def _add_rows(split: Split, rows: Iterable[tuple[str, Mapping[str, Any]]], data: DataConfig, arrow: bool) -> None:
    """Sort rows, (place, cells by column), into documents and conversations."""
    columns: tuple[str, ...] = ()
    for place, row in rows:
        columns = columns or columns_of(data, row)
        found = document_of(row, place, columns, data.task, arrow)
        if isinstance(found, str):
            split.documents.append(found)
        else:
            split.chats.append(found)


def columns_of(data: DataConfig, row: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns that are read: data.text, or by their names. Raises UserError where it is not clear which."""
    if data.text is not None:
        return data.text
    chats = next((columns for columns in CHATS if row.keys() >= {columns[0], columns[-1]}), None)
    if chats is None:
        return TEXT
    if TEXT[0] in row:
        both = f'"text", and {" and ".join(chats)}'
        raise UserError(f"data.text: missing, and the rows have the columns {both}; name those to read")
    return chats


def document_of(
    row: Mapping[str, Any], place: str, columns: Sequence[str], task: str, arrow: bool = True
) -> str | Conversation:
    """The text of a row, or its conversation.

    arrow: the row is of Parquet or of `datasets`, where each object of a column has the keys of all others.
    """
    for column in {columns[0], columns[-1]} - row.keys():
        cell(place.rpartition(": ")[0], place, row, "data.text", column)  # says that it is not there
    if len(columns) == 1 and columns != CHATS[0] and not isinstance(row[columns[0]], list):
        return cell_text(row[columns[0]], place, columns[0])
    if task == "mlm":
        raise UserError(f"{place}: a conversation, which mlm does not learn from; allowed: text, named in data.text")
    return conversation(_without_nulls(row) if arrow else row, place, columns)


def _without_nulls(value: Any) -> Any:
    """The value without the keys, at any depth, that hold nothing."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def token_stream(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, end: Sequence[int]) -> Arrays:
    """ "tokens" of all documents, `end` after each, and the "bytes" of UTF-8 that each stands for; int32.

    The bytes of a document's tokens add up to those of its text: what the tokenizer skips counts for the token behind.
    """

    def make() -> Arrays:
        tokens, sizes = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        for ids, num_bytes, last in _token_pieces(documents, tokenizer):
            tokens.append(ids)
            sizes.append(num_bytes)
            if last:
                tokens.append(np.array(end, np.int32))
                sizes.append(np.zeros(len(end), np.int32))
        return {"tokens": np.concatenate(tokens), "bytes": np.concatenate(sizes)}

    return cached(tokenizer, ("documents", list(end), *documents), make)


def tokens_of_each(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, end: Sequence[int]
) -> Iterator[np.ndarray]:
    """The tokens of each document and `end`, int32."""
    parts: list[np.ndarray] = []
    for ids, _, last in _token_pieces(documents, tokenizer):
        parts.append(ids)
        if last:
            yield np.concatenate([*parts, np.array(end, np.int32)])
            parts = []


def _token_pieces(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """(tokens, bytes of each, whether its document ends here) of every piece."""
    for batch in batches(documents):
        encoded = tokenised(
            tokenizer,
            [piece for piece, _ in batch],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=tokenizer.is_fast,
            verbose=False,
        )
        for row, (piece, last) in enumerate(batch):
            ids = np.array(encoded["input_ids"][row], np.int32)
            if not len(ids):
                yield ids, ids, last
            elif tokenizer.is_fast:
                yield ids, _bytes_of(piece, np.array(encoded["offset_mapping"][row])[:, 1]), last
            else:  # a tokenizer that does not say where its tokens lie: evenly
                reached = np.arange(len(ids) + 1) * len(piece.encode()) // len(ids)
                yield ids, np.diff(reached).astype(np.int32), last


def batches(documents: Sequence[str]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces of documents, each with whether it is its document's last, about TOKENIZE_CHARACTERS at once."""
    batch: list[tuple[str, bool]] = []
    characters = 0
    for document in documents:
        pieces = _pieces(document)
        for number, piece in enumerate(pieces, start=1):
            if batch and characters + len(piece) > TOKENIZE_CHARACTERS:
                yield batch
                batch, characters = [], 0
            batch.append((piece, number == len(pieces)))
            characters += len(piece)
    yield batch


def _pieces(text: str) -> list[str]:
    """The text, cut into at most TOKENIZE_CHARACTERS, at the end of a line where there is one."""
    pieces, start = [], 0
    while len(text) - start > TOKENIZE_CHARACTERS:
        stop = start + TOKENIZE_CHARACTERS
        stop = text.rfind("\n", start, stop) + 1 or stop
        pieces.append(text[start:stop])
        start = stop
    return [*pieces, text[start:]]


def _bytes_of(text: str, ends: np.ndarray) -> np.ndarray:
    """Bytes of each token, (tokens,) int32, by the character at which each ends; the last has the rest of the text."""
    characters = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (characters > 0x7F).astype(np.int64) + (characters > 0x7FF) + (characters > 0xFFFF)
    reached = np.maximum.accumulate(np.concatenate([[0], np.cumsum(widths)])[ends])
    reached[-1] = len(text.encode())
    return np.diff(reached, prepend=0).astype(np.int32)
