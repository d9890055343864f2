"""The order of training data: every example once, like lengths together, and a pure function of seed, step and rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from leap_dist.errors import UserError
from leap_dist.tasks.base import Collator, Task, TokenTable, flat
from leap_dist.train.batches import POOL, Batches, accumulation, bucketed, permutation
from leap_dist.zero.ranks import Ranks


def lengths(rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 60, rows)


def task(rows: int, augment: Any = None) -> Task:
    """Examples of many lengths; every token of one is its number."""
    ids = [[row] * size for row, size in enumerate(lengths(rows).tolist())]
    table = TokenTable(flat({"input_ids": ids}), labels=[0] * rows)
    collate = Collator(0, {"labels": torch.int64})
    evaluation: Any = None
    return Task("t", 2, table, {}, collate, evaluation, "", "regression", ("score",), augment=augment)


def rows_of(batches: list[dict[str, torch.Tensor]]) -> list[int]:
    return [row for batch in batches for row in batch["input_ids"][:, 0].tolist()]


def test_an_epoch_holds_every_example_once_on_all_ranks() -> None:
    made = [Batches(task(103), 2, 2, 5, Ranks(rank, 3, torch.device("cpu"))) for rank in range(3)]
    assert made[0].steps_per_epoch == 103 // 12
    for epoch in range(2):
        steps = range(epoch * 8, epoch * 8 + 8)
        seen = [row for step in steps for batches in made for row in rows_of(batches.step(step))]
        assert len(seen) == len(set(seen)) == 96


def test_a_step_does_not_depend_on_those_before_it() -> None:
    whole = Batches(task(103), 4, 1, 5, Ranks(0, 1, torch.device("cpu")))
    steps = [rows_of(whole.step(step)) for step in range(60)]
    resumed = Batches(task(103), 4, 1, 5, Ranks(0, 1, torch.device("cpu")))
    assert [rows_of(resumed.step(step)) for step in (37, 59, 3)] == [steps[37], steps[59], steps[3]]
    other = Batches(task(103), 4, 1, 6, Ranks(0, 1, torch.device("cpu")))
    assert rows_of(other.step(0)) != steps[0] and steps[0] != steps[25]


def test_ranks_share_the_calibration() -> None:
    alone = Batches(task(103), 2, 1, 5, Ranks(0, 1, torch.device("cpu")))
    one_by_one = [rows_of([batch]) for batch in alone.calibration(3)]
    # two ranks take twice as many examples a step, so other examples have like lengths; each has its own
    made = [Batches(task(103), 2, 1, 5, Ranks(rank, 2, torch.device("cpu"))) for rank in (0, 1)]
    parts = [[rows_of([batch]) for batch in own.calibration(3)] for own in made]
    assert [len(part) for part in parts] == [2, 2]  # ZeRO-3 asks all ranks for as many
    assert len({row for part in parts for rows in part for row in rows}) == 8
    assert len(one_by_one) == 3 and len({row for rows in one_by_one for row in rows}) == 6
    many = [Batches(task(103), 2, 1, 5, Ranks(rank, 32, torch.device("cpu"))) for rank in range(32)]
    assert [len(list(own.calibration(16))) for own in many] == [1] * 32


@pytest.mark.parametrize("layout", [(1, 12, 1), (1, 4, 3), (2, 2, 3), (3, 4, 1), (3, 1, 4), (6, 2, 1)])
def test_a_step_has_the_same_examples_however_it_is_spread(layout: tuple[int, int, int]) -> None:
    """layout: ranks, micro-batch, accumulation."""
    world, micro, number = layout
    ranks = [Ranks(rank, world, torch.device("cpu")) for rank in range(world)]
    made = [Batches(task(103), micro, number, 5, own) for own in ranks]
    whole = Batches(task(103), 12, 1, 5, Ranks(0, 1, torch.device("cpu")))
    for step in (0, 7, 8, 21):
        seen = sorted(row for batches in made for row in rows_of(batches.step(step)))
        assert seen == sorted(rows_of(whole.step(step)))


def test_chance_does_not_depend_on_how_a_step_is_spread() -> None:
    def drawn(world: int, micro: int, number: int) -> dict[int, float]:
        ranks = [Ranks(rank, world, torch.device("cpu")) for rank in range(world)]
        batches = [batch for own in ranks for batch in Batches(task(103, mark), micro, number, 5, own).step(7)]
        return dict(zip(rows_of(batches), torch.cat([batch["labels"] for batch in batches]).tolist(), strict=True))

    def mark(batch: dict[str, torch.Tensor], chances: Sequence[torch.Generator]) -> dict[str, torch.Tensor]:
        return batch | {"labels": torch.stack([torch.rand((), generator=chance) for chance in chances])}

    whole = drawn(1, 12, 1)
    assert len(set(whole.values())) == 12
    assert all(drawn(*layout) == whole for layout in [(1, 4, 3), (2, 2, 3), (3, 1, 4), (6, 2, 1)])


@pytest.mark.parametrize(
    ("given", "world", "micro_batches"),
    [
        ({}, 2, 1),
        ({"gradient_accumulation_steps": 3}, 2, 3),
        ({"train_batch_size": 48}, 2, 6),
        ({"train_batch_size": 48}, 4, 3),
        ({"train_batch_size": 24, "gradient_accumulation_steps": 3}, 2, 3),
    ],
)
def test_accumulation_is_given_or_fills_the_batch(given: dict[str, int], world: int, micro_batches: int) -> None:
    assert accumulation({"train_micro_batch_size_per_gpu": 4, **given}, world) == micro_batches


@pytest.mark.parametrize(
    ("given", "allowed"),
    [
        ({"train_batch_size": 2}, 8),
        ({"train_batch_size": 50}, 48),
        ({"train_batch_size": 48, "gradient_accumulation_steps": 3}, 24),
    ],
)
def test_a_batch_that_ranks_and_micro_batches_do_not_make_is_refused(given: dict[str, int], allowed: int) -> None:
    """DeepSpeed would refuse it too, by an assertion, once the model is loaded."""
    with pytest.raises(
        UserError, match=rf"train_batch_size: got \d+; allowed: {allowed}, as 2 ranks with .*leave it out"
    ):
        accumulation({"train_micro_batch_size_per_gpu": 4, **given}, 2)


def padding(order: np.ndarray, sizes: np.ndarray, batch: int) -> float:
    """Part of the tokens of all batches that is padding."""
    parts = sizes[order].reshape(-1, batch)
    return float(1 - parts.sum() / (parts.max(1) * batch).sum())


def test_like_lengths_are_together_and_little_is_padding() -> None:
    sizes = lengths(10_000)
    order = bucketed(sizes, 16, 0, 0)
    plain = np.array(permutation(10_000, 0, 0))[: len(order)]
    assert sorted(order) == sorted(plain)
    assert padding(plain, sizes, 16) > 0.4
    assert padding(order, sizes, 16) < 0.03
    firsts = sizes[order].reshape(-1, 16).mean(1)
    assert abs(np.corrcoef(firsts[:-1], firsts[1:])[0, 1]) < 0.1  # steps do not go from short to long
    pools = [set(part[: POOL * 16]) for part in (order, plain)]
    assert pools[0] == pools[1]  # sorted among neighbours of the permutation alone


def test_examples_of_one_length_are_left_as_they_are() -> None:
    order = bucketed(np.full(100, 9), 8, 3, 1)
    assert order.tolist() == permutation(100, 3, 1)[:96]


def test_chance_in_a_batch_is_decided_by_seed_step_and_place() -> None:
    def draw(batch: dict[str, torch.Tensor], chances: Sequence[torch.Generator]) -> dict[str, torch.Tensor]:
        return batch | {"labels": torch.stack([torch.randint(2**40, (), generator=chance) for chance in chances])}

    def draws(seed: int, rank: int, steps: list[int]) -> list[int]:
        batches = Batches(task(103, draw), 2, 2, seed, Ranks(rank, 2, torch.device("cpu")))
        return [mark for step in steps for batch in batches.step(step) for mark in batch["labels"].tolist()]

    found = draws(1, 0, [0, 1]) + draws(1, 1, [0, 1]) + draws(2, 0, [0, 1])
    assert len(set(found)) == 24
    assert draws(1, 0, [1]) == found[4:8]


def test_too_few_examples() -> None:
    with pytest.raises(UserError, match=r"data\.train: 7 examples do not fill one step of 8 \(train_micro"):
        Batches(task(7), 4, 2, 0, Ranks(0, 1, torch.device("cpu")))
