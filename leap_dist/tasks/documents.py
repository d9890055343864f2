"""Documents of plain text, and all their tokens in one stream.

A text file is a document, and so is every row of a table or of a hub dataset. Each is tokenised as a whole, so that
its tokens are those that the tokenizer alone would give, and is followed by what ends a text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from leap_dist.config.sections import DataConfig
from leap_dist.errors import UserError
from leap_dist.tasks.cache import Arrays, cached
from leap_dist.tasks.tables import hub_split, hub_texts, load_hub, read_text, read_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZE_CHARACTERS = 2**24
"""Text that the tokenizer sees at once, which bounds the memory of its answer. Longer documents are cut at a line."""
TABLES = (".tsv", ".csv", ".jsonl")
"""Files of rows, of which data.text names a column; any other file is plain text."""


def read_documents(data: DataConfig) -> list[tuple[str, list[str]]]:
    """(source, documents) of train and of validation; documents of white space alone are left out."""
    if not data.dataset and not data.train:
        raise UserError(f"data.train: missing; {data.task} needs local files in train and validation, or data.dataset")
    if data.text is not None and len(data.text) > 1:
        raise UserError(f"data.text: got {', '.join(data.text)}; allowed: one column for {data.task}")
    column = data.text[0] if data.text else "text"
    splits = load_hub("data.dataset", data.dataset, data.subset) if data.dataset else None
    found = []
    for key, name in (("data.train", data.train or "train"), ("data.validation", data.validation or "validation")):
        if splits is not None:
            source = f"{data.dataset} {name}"
            texts = hub_texts(hub_split(splits, key, name), source, column)
        else:
            source, file = f"{key}: {name}", Path(name).expanduser()
            texts = read_texts(key, file, column) if _is_table(key, file, data) else [read_text(key, file)]
        documents = [text for text in texts if text.strip()]
        if not documents:
            raise UserError(f"{source}: no text in it")
        found.append((source, documents))
    return found


def _is_table(key: str, file: Path, data: DataConfig) -> bool:
    """Whether a file has rows; UserError for JSON, which is neither rows nor text, and for a column of plain text."""
    kind = file.suffix.lower()
    if kind == ".json":
        raise UserError(f"{key}: got {file}; allowed: plain text, or rows in {', '.join(TABLES)}")
    if kind not in TABLES and data.text is not None:
        raise UserError(f"data.text: got {data.text[0]}, but {file} is plain text and has no columns: remove it")
    return kind in TABLES


def token_stream(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, end: Sequence[int]) -> Arrays:
    """ "tokens" of all documents, `end` after each, and the "bytes" of UTF-8 that each stands for; int32.

    The bytes of a document's tokens add up to those of its text: what the tokenizer skips counts for the token behind.
    """

    def make() -> Arrays:
        tokens, sizes = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        for ids, num_bytes, last in _tokenised(documents, tokenizer):
            tokens.append(ids)
            sizes.append(num_bytes)
            if last:
                tokens.append(np.array(end, np.int32))
                sizes.append(np.zeros(len(end), np.int32))
        return {"tokens": np.concatenate(tokens), "bytes": np.concatenate(sizes)}

    return cached(tokenizer, ("documents", list(end), *documents), make)


def _tokenised(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """(tokens, bytes of each, whether its document ends here) of every piece."""
    for batch in batches(documents):
        encoded = tokenizer(
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
