"""Language modelling on plain text: the next word ("lm", causal) or words left out ("mlm", masked).

The documents of a split are one stream of tokens, what ends a text after each, cut into blocks of `max_length`: no
padding, nothing cut off. A block starts as the tokenizer starts a text (BOS), one of a masked model ends as it ends a
text too ([SEP]). The part block at the end is dropped in training and judged in validation.

With `data.stride` the blocks of validation overlap, each begins `stride` tokens after the one before, and only the
tokens that no earlier block has are judged: https://huggingface.co/docs/transformers/perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from leap_dist.config.sections import DataConfig
from leap_dist.errors import UserError
from leap_dist.ops.words import IGNORED
from leap_dist.tasks.base import Batch, Collator, Example, Task, TokenTable, flat, pad_id
from leap_dist.tasks.cache import Arrays
from leap_dist.tasks.chats import chat_table
from leap_dist.tasks.documents import Frame, Split, frame_of, read_split, token_stream
from leap_dist.tasks.head import WordHead
from leap_dist.tasks.stream import open_stream
from leap_dist.tasks.tables import load_hub

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CAUSAL, MASKED = "lm", "mlm"
NAMES = (CAUSAL, MASKED)
NOTHING = TokenTable(flat({"input_ids": []}))
"""The training examples of a stream before it is read, and of a model that is judged."""
BYTES = "bytes"
"""The number of an example: bytes of UTF-8 that its judged tokens stand for."""


def load(data: DataConfig, tokenizer: PreTrainedTokenizerBase, judge: bool = False) -> Task:
    """The task from local files, or from `data.dataset`; to `judge` a model, without training examples."""
    if not data.dataset and not data.train:
        raise UserError(f"data.train: missing; {data.task} needs local files in train and validation, or data.dataset")
    masked = data.task == MASKED
    if masked and data.text is not None and len(data.text) > 1:
        raise UserError(f"data.text: got {', '.join(data.text)}; allowed: one column for {data.task}")
    masking = _masking(data, tokenizer) if masked else None
    frame = frame_of(tokenizer, masked)
    splits = load_hub("data.dataset", data.dataset, data.subset) if data.dataset and not data.streaming else None
    stream = open_stream(data, tokenizer, frame) if data.streaming and not judge else None
    train = NOTHING
    if not stream and not judge:
        train = _examples(read_split("data.train", data, splits), tokenizer, frame, data, whole=True)
    found = _examples(read_split("data.validation", data, splits), tokenizer, frame, data, whole=False)
    validation = _masked(found, masking, data.seed) if masking else _judged(found)
    pad = pad_id(tokenizer)
    return Task(
        name=data.task,
        num_labels=2,
        train=train,
        validation={"validation": validation},
        collate=Collator(pad, {}) if masked else CausalCollator(pad),
        evaluation=TokenEvaluation(causal=not masked),
        primary="perplexity",
        problem="masked_lm" if masked else "causal_lm",
        label_names=(),
        vocab_size=len(tokenizer),
        max_length=max(data.max_length if stream else train.longest, validation.longest),
        pad_id=pad,
        augment=masking,
        stream=stream,
    )


class CausalCollator(Collator):
    """Every token is the label of those before it, if the examples have no labels; models shift by one themselves."""

    def __init__(self, pad_id: int) -> None:
        super().__init__(pad_id, {BYTES: torch.int64})

    def __call__(self, examples: Sequence[Example]) -> Batch:
        batch = super().__call__(examples)
        return {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)} | batch


@dataclass(frozen=True)
class TokenEvaluation:
    """Judges the word at every token that has a label; `causal`: it is predicted by the token before."""

    causal: bool

    def predict(self, model: Callable[..., Any], batch: Batch) -> dict[str, Tensor]:
        """Sums over each example's labelled tokens, (batch,): loss (in float64), right, tokens, and bytes if known."""
        asked = {key: value for key, value in batch.items() if key != BYTES}
        words, labels = WordHead(model, self.causal), batch["labels"][:, 1:] if self.causal else batch["labels"]
        judged = words.judge(asked) if words.fits(asked) else self._judge(model, asked)
        known = {BYTES: batch[BYTES]} if BYTES in batch else {}
        loss, right = judged.double().sum(1).unbind(-1)
        return {"loss": loss, "right": right.long(), "tokens": (labels != IGNORED).sum(-1), **known}

    def _judge(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """As WordHead.judge, from a model that gives all logits at once."""
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        labels = batch["labels"]
        if self.causal:
            logits, labels = logits[:, :-1], labels[:, 1:]
        # one example at a time: a copy of all logits in float32 is the largest thing on the device
        losses = [
            F.cross_entropy(row.float(), true, ignore_index=IGNORED, reduction="none")
            for row, true in zip(logits, labels, strict=True)
        ]
        return torch.stack([torch.stack(losses), (logits.argmax(-1) == labels).float()], dim=-1)

    def score(self, split: str, kept: Mapping[str, Tensor]) -> dict[str, float]:
        """perplexity = exp(loss), the part of words that are right, and the loss: means over all labelled tokens.

        bits_per_byte: the loss in bits over the bytes of text that was judged; it compares models whose tokens differ.
        """
        tokens, total = kept["tokens"].sum().item(), kept["loss"].sum().item()
        values = {"perplexity": float(np.exp(total / tokens))}
        if BYTES in kept:
            values["bits_per_byte"] = total / math.log(2.0) / max(kept[BYTES].sum().item(), 1)
        return values | {"accuracy": kept["right"].sum().item() / tokens, "loss": total / tokens}


# ---------------------------------------------------------------------------------------------- masking


@dataclass(frozen=True)
class Masking:
    """Leaves words out: of those chosen, 8 of 10 become the mask, 1 of 10 another word, 1 of 10 stay."""

    probability: float
    mask_id: int
    vocab_size: int
    special: Tensor = field(repr=False)

    def __call__(self, batch: Batch, chances: Sequence[torch.Generator]) -> Batch:
        """The batch with words left out and labels for them; at least one in every row that has a word. `chances`: of
        each row."""
        ids = batch["input_ids"]
        chance, kind, words = map(torch.stack, zip(*map(self._draw, chances, ids), strict=True))
        chance = chance.masked_fill(torch.isin(ids, self.special) | (batch["attention_mask"] == 0), 2.0)
        chosen = (chance < self.probability) | ((chance == chance.amin(-1, keepdim=True)) & (chance < 1))
        changed = torch.where(kind < 0.8, self.mask_id, torch.where(kind < 0.9, words, ids))
        return batch | {
            "input_ids": torch.where(chosen, changed, ids),
            "labels": ids.masked_fill(~chosen, IGNORED),
        }

    def _draw(self, generator: torch.Generator, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For every token: its chance to be chosen, what becomes of it then, and another word."""
        chance, kind = (torch.rand(len(row), generator=generator) for _ in range(2))
        return chance, kind, torch.randint(self.vocab_size, (len(row),), generator=generator)


def _masking(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Masking:
    if tokenizer.mask_token_id is None:
        raise UserError('data.task: got "mlm"; the tokenizer has no mask token: use another model, or "task": "lm"')
    special = torch.tensor(sorted(tokenizer.all_special_ids))
    return Masking(data.mask_probability, tokenizer.mask_token_id, len(tokenizer), special)


def _masked(table: TokenTable, masking: Masking, seed: int) -> TokenTable:
    """Every row masked once and for all."""
    generator = torch.Generator().manual_seed(seed)
    keys = ("input_ids", "attention_mask")
    flat = {key: torch.from_numpy(table.columns[key])[None].long() for key in keys}
    rows = [
        masking({key: ids[:, a:b] for key, ids in flat.items()}, [generator])
        for a, b in pairwise(table.starts.tolist())
    ]
    new = {key: torch.cat([row[key][0] for row in rows]).int().numpy() for key in (*keys, "labels")}
    return TokenTable({**new, "starts": table.starts})


# ---------------------------------------------------------------------------------------------- blocks


def _examples(
    split: Split, tokenizer: PreTrainedTokenizerBase, frame: Frame, data: DataConfig, whole: bool
) -> TokenTable:
    """Conversations one by one, documents in blocks."""
    if split.chats:
        if data.stride is not None:
            why = f"{split.source} has conversations, which are judged one by one: remove it"
            raise UserError(f"data.stride: got {data.stride}; {why}")
        return chat_table(split.source, split.chats, tokenizer, data.max_length)
    table = _blocks(split.source, token_stream(split.documents, tokenizer, frame.end), frame, data, whole)
    if data.task == MASKED and np.isin(table.columns["input_ids"], tokenizer.all_special_ids).all():
        problem = "got no word that can be left out, as the tokenizer knows none of them"
        raise UserError(f"{split.source}: {problem}; allowed: text that the tokenizer is made for")
    return table


def _blocks(source: str, stream: Arrays, frame: Frame, data: DataConfig, whole: bool) -> TokenTable:
    """Blocks of max_length tokens: input_ids and attention_mask; `whole`: no part block, and none that overlap.

    Else also labels, which are the tokens that no earlier block has, and the bytes of each token.
    """
    tokens, num_bytes = stream["tokens"], stream["bytes"]
    if frame.after:  # what ends the last block ends the last document
        tokens = tokens[: len(tokens) - len(frame.end)]
    width = data.max_length - len(frame.before) - len(frame.after)
    stride = width if whole or data.stride is None else data.stride
    if stride > width:
        special = f"data.max_length without the {data.max_length - width} special tokens of a block"
        raise UserError(f"data.stride: got {stride}; allowed: at most {width}, {special}")
    fewest = width if whole else (2 if data.task == CAUSAL and not frame.before else 1)
    spans = [(a, b, seen) for a, b, seen in _spans(len(tokens), width, stride) if b - a >= fewest]
    if not spans:
        least = f"{fewest} (a block of data.max_length)" if whole else str(fewest)
        raise UserError(f"{source}: got {len(tokens)} tokens; allowed: at least {least}")
    ids = _framed([tokens[a:b] for a, b, _ in spans], frame.before, frame.after)
    lengths = [len(frame.before) + b - a + len(frame.after) for a, b, _ in spans]
    table = {"input_ids": ids, "attention_mask": np.ones_like(ids), "starts": np.cumsum([0, *lengths])}
    if not whole:
        around = [[value] * len(part) for value in (IGNORED, 0) for part in (frame.before, frame.after)]
        new = [np.concatenate([np.full(seen - a, IGNORED), tokens[seen:b]]) for a, b, seen in spans]
        table["labels"] = _framed(new, *around[:2])
        table[BYTES] = _framed([num_bytes[a:b] for a, b, _ in spans], *around[2:])
    return TokenTable(table)


def _spans(length: int, width: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first token that no earlier span has) of all that `length` tokens give."""
    seen = 0
    for start in range(0, length, stride):
        stop = min(start + width, length)
        yield start, stop, seen
        seen = stop
        if stop == length:
            break


def _framed(parts: Sequence[np.ndarray], before: Sequence[int], after: Sequence[int]) -> np.ndarray:
    """All parts, each between `before` and `after`, int32."""
    pieces = [piece for part in parts for piece in (before, part, after)]
    return np.concatenate(pieces, dtype=np.int32, casting="unsafe")  # numpy takes an empty list for floats


def _judged(table: TokenTable) -> TokenTable:
    """The table with the bytes of what is judged in each block, in place of those of each token.

    Conversations have none: how a template writes them, not their text alone, would decide them.
    """
    if BYTES not in table.columns:
        return table
    columns = dict(table.columns)
    judged = columns["labels"] != IGNORED
    judged[table.starts[:-1]] = False  # no token before it predicts it
    num_bytes = np.add.reduceat(np.where(judged, columns.pop(BYTES), 0), table.starts[:-1])
    return TokenTable({**columns, "starts": table.starts}, **{BYTES: num_bytes})
