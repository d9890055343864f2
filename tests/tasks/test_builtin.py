"""The clock task: right answers, disjoint splits, and nothing to learn without comparing positions."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from leap_dist.config.job_file import load_job
from leap_dist.config.sections import DataConfig
from leap_dist.errors import UserError
from leap_dist.models.load import load_model
from leap_dist.tasks import Task, load_task, needs_tokenizer
from leap_dist.tasks.base import Collator, TokenTable, flat
from leap_dist.tasks.builtin import BASE, DIGITS, LENGTH, NUM_SPECIAL, TICKS, VOCAB_SIZE


def clock(seed: int = 0) -> Task:
    return load_task(DataConfig(task="builtin/clock", seed=seed), None)


def arrays(table: TokenTable) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (examples, LENGTH) and labels (examples,)."""
    return table.columns["input_ids"].reshape(-1, LENGTH), table.numbers["labels"]


@pytest.fixture(scope="module")
def task() -> Task:
    return clock()


@pytest.fixture(scope="module")
def everything(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """All examples of both splits."""
    parts = [arrays(table) for table in (task.train, task.validation["validation"])]  # type: ignore[arg-type]
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([labels for _, labels in parts])


def test_needs_no_tokenizer() -> None:
    assert not needs_tokenizer("builtin/clock")


def test_every_pair_with_an_answer_is_there_once(everything: tuple[np.ndarray, np.ndarray]) -> None:
    ids, labels = everything
    assert len(labels) == TICKS * (TICKS - 2)
    assert len(np.unique(ids, axis=0)) == len(ids)
    assert ids.min() > 0
    assert ids.max() == VOCAB_SIZE - 1


def test_labels_say_which_way_round_is_shorter(everything: tuple[np.ndarray, np.ndarray]) -> None:
    """Decode with the permutations that seed 0 draws, and answer by counting ticks one by one."""
    rng = np.random.default_rng(0)
    digit_of = [np.argsort(rng.permutation(BASE)) for _ in range(DIGITS)]

    def ticks(words: np.ndarray) -> int:
        digits = [int(digit_of[k][word - NUM_SPECIAL - BASE * k]) for k, word in enumerate(words)]
        return sum(digit * BASE ** (DIGITS - 1 - k) for k, digit in enumerate(digits))

    ids, labels = everything
    for row in range(0, len(ids), 97):
        first, second = ticks(ids[row, 1 : 1 + DIGITS]), ticks(ids[row, 2 + DIGITS : 2 + 2 * DIGITS])
        steps = next(count for count in range(1, TICKS) if (first + count) % TICKS == second)
        assert labels[row] == (steps < TICKS / 2)


def test_splits_share_no_pair_in_any_order(task: Task) -> None:
    def pairs(table: TokenTable) -> set[frozenset[bytes]]:
        ids, _ = arrays(table)
        return {frozenset((row[1 : 1 + DIGITS].tobytes(), row[2 + DIGITS : -1].tobytes())) for row in ids}

    train, validation = pairs(task.train), pairs(task.validation["validation"])  # type: ignore[arg-type]
    assert not train & validation
    assert len(train) + len(validation) == TICKS * (TICKS - 2) // 2
    assert 0.08 < len(validation) / len(train) < 0.14


def test_both_splits_are_exactly_balanced(task: Task) -> None:
    for table in (task.train, task.validation["validation"]):
        _, labels = arrays(table)  # type: ignore[arg-type]
        assert labels.mean() == 0.5


def test_a_bag_of_words_tells_nothing(task: Task) -> None:
    for table in (task.train, task.validation["validation"]):
        ids, labels = arrays(table)  # type: ignore[arg-type]
        lean: Counter[bytes] = Counter()
        for row, label in zip(np.sort(ids, axis=1), labels, strict=True):
            lean[row.tobytes()] += 1 if label else -1
        assert set(lean.values()) == {0}


def test_no_position_alone_tells_anything(everything: tuple[np.ndarray, np.ndarray]) -> None:
    ids, labels = everything
    for position in range(LENGTH):
        for word in np.unique(ids[:, position]):
            assert labels[ids[:, position] == word].mean() == 0.5


def test_the_seed_decides_words_and_split() -> None:
    same, other = arrays(clock(3).train), arrays(clock(4).train)  # type: ignore[arg-type]
    again = arrays(clock(3).train)  # type: ignore[arg-type]
    assert np.array_equal(same[0], again[0])
    assert same[0].shape != other[0].shape or not np.array_equal(same[0], other[0])


def test_a_batch_and_its_metric(task: Task) -> None:
    batch = task.collate(task.train[:5])
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "input_ids": (5, LENGTH),
        "attention_mask": (5, LENGTH),
        "labels": (5,),
    }
    kept = {"prediction": torch.tensor([1, 0, 1, 1]), "label": torch.tensor([1, 0, 0, 1]), "loss": torch.arange(4.0)}
    assert task.evaluation.score("validation", kept) == {task.primary: 0.75, "loss": 1.5}


def test_the_embedded_job_fits_the_task(task: Task) -> None:
    model = load_model(load_job("ds_leap").model, task)
    assert model(**task.collate(task.train[:3])).logits.shape == (3, 2)


@pytest.mark.parametrize(("key", "needed"), [("vocab_size", VOCAB_SIZE), ("max_position_embeddings", LENGTH)])
def test_a_model_that_is_too_small(task: Task, key: str, needed: int) -> None:
    model = load_job("ds_leap", [f"model.from_config.{key}={needed - 1}"]).model
    with pytest.raises(UserError, match=f"model: {key} is {needed - 1}; allowed: at least {needed}, builtin/clock"):
        load_model(model, task)


def test_collator_pads_on_the_right() -> None:
    examples = [{"input_ids": [5], "attention_mask": [1], "labels": 0.5},
                {"input_ids": [6, 7], "attention_mask": [1, 1], "labels": 1.0}]  # fmt: skip
    batch = Collator(9, {"labels": torch.float32})(examples)
    assert batch["input_ids"].tolist() == [[5, 9], [6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert batch["labels"].dtype == torch.float32


def test_token_table_is_a_sequence() -> None:
    table = TokenTable(flat({"input_ids": [[1, 2], [], [3]]}), labels=[0, 1, 2])
    assert table[-1] == {"input_ids": [3], "labels": 2}
    assert table[1:] == [{"input_ids": [], "labels": 1}, {"input_ids": [3], "labels": 2}]
    assert [example["labels"] for example in table] == [0, 1, 2]
    assert table.longest == 2
    with pytest.raises(IndexError, match="out of range"):
        table[3]
