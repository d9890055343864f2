"""Language modelling on plain text: the next word ("lm", causal) or words left out ("mlm", masked).

The texts of a split are one stream of tokens, cut into blocks of `max_length`: no padding, nothing cut off. The part
block at the end is dropped in training and judged in validation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from leap_dist.config.sections import DataConfig
from leap_dist.errors import UserError
from leap_dist.tasks.base import IGNORED, Batch, Collator, Example, Task, TokenTable, pad_id
from leap_dist.tasks.cache import Arrays, cached
from leap_dist.tasks.tables import hub_column, hub_split, load_hub, read_cells, reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CAUSAL, MASKED = "lm", "mlm"
NAMES = (CAUSAL, MASKED)
TOKENIZE_CHARACTERS = 2**18
"""Text that the tokenizer sees at once, give or take a line: bounds the memory of its answer."""
TABLES = (".tsv", ".csv", ".jsonl")
"""Files of rows, of which data.text names a column; any other file is plain text."""


def load(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Task:
    """The task from local files, or from `data.dataset`."""
    masked = data.task == MASKED
    masking = _masking(data, tokenizer) if masked else None
    train, validation = (
        _blocks(source, _stream(text, tokenizer, data.task), tokenizer, data, whole)
        for (source, text), whole in zip(_texts(data), (True, False), strict=True)
    )
    pad = pad_id(tokenizer)
    return Task(
        name=data.task,
        num_labels=2,
        train=train,
        validation={"validation": _masked(validation, masking, data.seed) if masking else validation},
        collate=Collator(pad, {}) if masked else CausalCollator(pad),
        evaluation=TokenEvaluation(causal=not masked),
        primary="perplexity",
        problem="masked_lm" if masked else "causal_lm",
        label_names=(),
        vocab_size=len(tokenizer),
        max_length=max(train.longest, validation.longest),
        augment=masking,
    )


class CausalCollator(Collator):
    """Every token is the label of those before it; models shift by one themselves."""

    def __init__(self, pad_id: int) -> None:
        super().__init__(pad_id, {})

    def __call__(self, examples: Sequence[Example]) -> Batch:
        batch = super().__call__(examples)
        return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)}


@dataclass(frozen=True)
class TokenEvaluation:
    """Judges the word at every token that has a label; `causal`: it is predicted by the token before."""

    causal: bool

    def predict(self, model: Callable[..., Any], batch: Batch) -> dict[str, Tensor]:
        """Sums over each example's labelled tokens, (batch,): loss (in float64), right, tokens."""
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        labels = batch["labels"]
        if self.causal:
            logits, labels = logits[:, :-1], labels[:, 1:]
        # one example at a time: a copy of all logits in float32 is the largest thing on the device
        losses = [
            F.cross_entropy(row.float(), true, ignore_index=IGNORED, reduction="none").double().sum()
            for row, true in zip(logits, labels, strict=True)
        ]
        right = (logits.argmax(-1) == labels).sum(-1)
        return {"loss": torch.stack(losses), "right": right, "tokens": (labels != IGNORED).sum(-1)}

    def score(self, split: str, kept: Mapping[str, Tensor]) -> dict[str, float]:
        """perplexity = exp(loss), the part of words that are right, and the loss: means over all labelled tokens."""
        tokens = kept["tokens"].sum().item()
        loss = kept["loss"].sum().item() / tokens
        accuracy = kept["right"].sum().item() / tokens
        return {"perplexity": float(np.exp(loss)), "accuracy": accuracy, "loss": loss}


# ---------------------------------------------------------------------------------------------- masking


@dataclass(frozen=True)
class Masking:
    """Leaves words out: of those chosen, 8 of 10 become the mask, 1 of 10 another word, 1 of 10 stay."""

    probability: float
    mask_id: int
    vocab_size: int
    special: Tensor = field(repr=False)

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with words left out and labels for them; at least one in every row that has a word."""
        ids = batch["input_ids"]
        chance = torch.rand(ids.shape, generator=generator)
        chance = chance.masked_fill(torch.isin(ids, self.special) | (batch["attention_mask"] == 0), 2.0)
        chosen = (chance < self.probability) | ((chance == chance.amin(-1, keepdim=True)) & (chance < 1))
        kind = torch.rand(ids.shape, generator=generator)
        words = torch.randint(self.vocab_size, ids.shape, generator=generator)
        changed = torch.where(kind < 0.8, self.mask_id, torch.where(kind < 0.9, words, ids))
        return batch | {
            "input_ids": torch.where(chosen, changed, ids),
            "labels": ids.masked_fill(~chosen, IGNORED),
        }


def _masking(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Masking:
    if tokenizer.mask_token_id is None:
        raise UserError('data.task: got "mlm"; the tokenizer has no mask token: take another model, or "task": "lm"')
    special = torch.tensor(sorted(tokenizer.all_special_ids))
    return Masking(data.mask_probability, tokenizer.mask_token_id, len(tokenizer), special)


def _masked(table: TokenTable, masking: Masking, seed: int) -> TokenTable:
    """Every row masked once and for all."""
    generator = torch.Generator().manual_seed(seed)
    flat = {key: torch.from_numpy(table.columns[key])[None].long() for key in ("input_ids", "attention_mask")}
    rows = [
        masking({key: ids[:, a:b] for key, ids in flat.items()}, generator) for a, b in pairwise(table.starts.tolist())
    ]
    new = {key: torch.cat([row[key][0] for row in rows]).int().numpy() for key in ("input_ids", "labels")}
    return TokenTable({**table.columns, **new, "starts": table.starts})


# ---------------------------------------------------------------------------------------------- blocks


def _blocks(
    source: str, stream: np.ndarray, tokenizer: PreTrainedTokenizerBase, data: DataConfig, whole: bool
) -> TokenTable:
    """Blocks of max_length tokens, of a masked model between its special tokens; `whole`: no part block."""
    before, after = _frame(tokenizer) if data.task == MASKED else ([], [])
    width = data.max_length - len(before) - len(after)
    fewest = width if whole else (2 if data.task == CAUSAL else 1)
    parts = [stream[start : start + width] for start in range(0, len(stream), width)]
    parts = [part for part in parts if len(part) >= fewest]
    if not parts:
        least = f"{fewest} (a block of data.max_length)" if whole else str(fewest)
        raise UserError(f"{source}: got {len(stream)} tokens; allowed: at least {least}")
    framed = [np.concatenate([before, part, after]).astype(np.int32) for part in parts]
    ids = np.concatenate(framed)
    return TokenTable(
        {"input_ids": ids, "attention_mask": np.ones_like(ids), "starts": np.cumsum([0, *map(len, framed)])}
    )


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that a single text has before and after it."""
    probe = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    at = next(i for i in range(len(framed)) if framed[i : i + len(probe)] == probe)
    return framed[:at], framed[at + len(probe) :]


def _stream(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, task: str) -> np.ndarray:
    """All tokens of the texts, no special ones between them; int32."""

    def make() -> Arrays:
        parts = [np.zeros(0, dtype=np.int32)]
        for text in texts:
            encoded = tokenizer(text, add_special_tokens=False, verbose=False)
            parts.append(np.array(encoded["input_ids"], dtype=np.int32))
        return {"tokens": np.concatenate(parts)}

    return cached(tokenizer, (task, *texts), make)["tokens"]


# ---------------------------------------------------------------------------------------------- reading


def _texts(data: DataConfig) -> list[tuple[str, list[str]]]:
    """(source, text in pieces) of train and validation."""
    if not data.dataset and not data.train:
        raise UserError(f"data.train: missing; {data.task} needs local files in train and validation, or data.dataset")
    found = []
    splits = load_hub("data.dataset", data.dataset, data.subset) if data.dataset else None
    for key, name in (("data.train", data.train or "train"), ("data.validation", data.validation or "validation")):
        if splits is not None:
            source = f"{data.dataset} {name}"
            rows = hub_column(hub_split(splits, key, name), "data.text", _column(data))
            lines = [f"{row.removesuffix(chr(10))}\n" for row in rows]
        else:
            source, lines = f"{key}: {name}", _lines(key, Path(name), _column(data))
        if not any(line.strip() for line in lines):
            raise UserError(f"{source}: no text in it")
        found.append((source, _pieces(lines)))
    return found


def _column(data: DataConfig) -> str:
    if data.text is not None and len(data.text) > 1:
        raise UserError(f"data.text: got {', '.join(data.text)}; allowed: one column for {data.task}")
    return data.text[0] if data.text else "text"


def _lines(key: str, file: Path, column: str) -> list[str]:
    """The lines of a text file, or the rows of a column; each ends a line."""
    if file.suffix.lower() in TABLES:
        return [f"{row}\n" for (row,) in read_cells(key, file, [("data.text", column)])]
    with reading(key, file):
        return file.read_text("utf-8-sig").splitlines(keepends=True)


def _pieces(lines: Sequence[str]) -> list[str]:
    """Whole lines in pieces of about TOKENIZE_CHARACTERS."""
    ends = np.cumsum([len(line) for line in lines]) // TOKENIZE_CHARACTERS
    cuts = [0, *(np.flatnonzero(np.diff(ends)) + 1).tolist(), len(lines)]
    return ["".join(lines[a:b]) for a, b in pairwise(cuts)]
