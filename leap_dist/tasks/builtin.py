"""builtin/clock: which way round is shorter? A task that the package makes itself, with nothing to download.

A clock has 6 x 6 x 6 = 216 ticks, and a time is written with three words: hour, minute, second. The words are
arbitrary (a seeded permutation), so a model must learn what each stands for. An example is two times,

    [CLS] hour minute second [SEP] hour minute second [SEP]

and its label says whether the second time lies within the half turn after the first (1) or before it (0).
Times that are equal or exactly opposite are left out. What follows by construction:

- whatever the first time is, half of the second times are after it: no word, no time alone says anything;
- swapping the two times flips the label and keeps the bag of words; both orders are in the same split. So a
  bag of words says nothing, both splits are exactly balanced, and a validation pair is in train in no order;
- the hour decides most examples, the minute some, the second few: an accuracy that degrades by degrees.
"""

from __future__ import annotations

import numpy as np
import torch

from leap_dist.config.sections import DataConfig
from leap_dist.tasks.base import Collator, Task, TokenTable, flat
from leap_dist.tasks.metrics import LabelEvaluation

CLOCK = "builtin/clock"
NAMES = (CLOCK,)

PAD, CLS, SEP = 0, 1, 2
NUM_SPECIAL = 3
BASE = 6
"""Words for each of hour, minute and second."""
DIGITS = 3
TICKS = BASE**DIGITS
VOCAB_SIZE = NUM_SPECIAL + DIGITS * BASE
LENGTH = 2 * DIGITS + 3
"""Tokens of an example; all are of this length."""
VALIDATION_PARTS = 10
"""One pair of times in so many is for validation."""


def load(data: DataConfig) -> Task:
    """The clock task; `data.seed` decides the words and the split."""
    first, second, labels = _all_pairs()
    rng = np.random.default_rng(data.seed)
    words = np.stack([rng.permutation(BASE) for _ in range(DIGITS)])
    held_out = _pair_hash(first, second, data.seed) % VALIDATION_PARTS == 0
    tokens = _spell(first, second, words)
    return Task(
        name=CLOCK,
        num_labels=2,
        train=_table(tokens[~held_out], labels[~held_out]),
        validation={"validation": _table(tokens[held_out], labels[held_out])},
        collate=Collator(PAD, {"labels": torch.int64}),
        evaluation=LabelEvaluation(("accuracy",), 2),
        primary="accuracy",
        problem="single_label_classification",
        label_names=("before", "after"),
        vocab_size=VOCAB_SIZE,
        max_length=LENGTH,
        pad_id=PAD,
    )


def _all_pairs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every ordered pair of times that has an answer, and the answers: three int64 arrays (pairs,)."""
    first, second = (axis.ravel() for axis in np.meshgrid(np.arange(TICKS), np.arange(TICKS), indexing="ij"))
    ahead = (second - first) % TICKS
    answered = (ahead != 0) & (2 * ahead != TICKS)
    return first[answered], second[answered], (2 * ahead[answered] < TICKS).astype(np.int64)


def _pair_hash(first: np.ndarray, second: np.ndarray, seed: int) -> np.ndarray:
    """A well-mixed uint64 (pairs,) of the unordered pair and the seed (the finalizer of splitmix64)."""
    low, high = np.minimum(first, second), np.maximum(first, second)
    start = np.uint64((seed * TICKS**2 + 0x9E3779B97F4A7C15) % 2**64)
    mixed = (low * TICKS + high).astype(np.uint64) + start
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _spell(first: np.ndarray, second: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Token ids (pairs, LENGTH) of the examples; `words` (DIGITS, BASE) holds the word for each digit."""
    cls, sep = np.full_like(first, CLS), np.full_like(first, SEP)
    return np.stack([cls, *_time_words(first, words), sep, *_time_words(second, words), sep], axis=1)


def _time_words(time: np.ndarray, words: np.ndarray) -> list[np.ndarray]:
    """The DIGITS token ids of each time, most significant first; each digit has its own words."""
    digits = [time // BASE ** (DIGITS - 1 - place) % BASE for place in range(DIGITS)]
    return [NUM_SPECIAL + BASE * place + words[place][digit] for place, digit in enumerate(digits)]


def _table(tokens: np.ndarray, labels: np.ndarray) -> TokenTable:
    return TokenTable(flat({"input_ids": tokens, "attention_mask": np.ones_like(tokens)}), labels=labels)
