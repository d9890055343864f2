"""Evaluation: every example counted once, in its own place, whatever the number of ranks and the batch size."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from leap_dist.tasks.base import Collator, Task, TokenTable, flat
from leap_dist.tasks.lm import CausalCollator, TokenEvaluation
from leap_dist.train import progress
from leap_dist.train.evaluate import evaluate
from leap_dist.zero.ranks import Ranks
from tests.ranks import RankPools

LENGTHS = [3, 9, 1, 4, 4, 2, 7]


class Counting:
    """Keeps what every example was; scores tell whether all came back, once, in order."""

    def predict(self, model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        model(**batch)
        return {"first": batch["input_ids"][:, 0], "pair": batch["labels"][:, None].repeat(1, 2).double()}

    def score(self, split: str, kept: Mapping[str, Tensor]) -> dict[str, float]:
        rows = len(kept["first"])
        in_order = kept["first"].tolist() == list(range(rows)) and kept["pair"][:, 1].tolist() == [0.5] * rows
        return {"rows": float(rows), "in_order": float(in_order), "double": float(kept["pair"].dtype == torch.float64)}


class Engine:
    """Stands for the hosted model; `longest` are the lengths of the batches that went through."""

    def __init__(self) -> None:
        self.longest: list[int] = []
        self.modes: list[str] = []

    def __call__(self, **batch: Tensor) -> Any:
        self.longest.append(batch["input_ids"].shape[1])
        return SimpleNamespace(logits=None)

    def train(self) -> None:
        self.modes.append("train")

    def eval(self) -> None:
        self.modes.append("eval")


def task(*sizes: int) -> Task:
    """Splits of so many examples; the first token of an example is its number."""
    splits = {}
    for number, size in enumerate(sizes):
        ids = [[row] * LENGTHS[row % len(LENGTHS)] for row in range(size)]
        splits[f"split{number}"] = TokenTable(flat({"input_ids": ids}), labels=[0.5] * size)
    collate = Collator(0, {"labels": torch.float32})
    return Task("t", 2, [], splits, collate, Counting(), "rows", "regression", ("score",))


def on_ranks(world_size: int, batch_size: int, sizes: tuple[int, ...]) -> tuple[dict[str, float], list[int], list[str]]:
    engine = Engine()
    rank = torch.distributed.get_rank() if world_size > 1 else 0
    values = evaluate(engine, task(*sizes), batch_size, Ranks(rank, world_size, torch.device("cpu")))
    return values, engine.longest, engine.modes


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_every_example_once_on_any_number_of_ranks(ranks: RankPools, world_size: int, batch_size: int) -> None:
    sizes = (7, 1, 12)
    call = (on_ranks, world_size, batch_size, sizes)
    results = ranks(world_size).run(*call) if world_size > 1 else [on_ranks(*call[1:])]
    for values, longest, modes in results:
        assert [values[f"{prefix}rows"] for prefix in ("", "split1_", "split2_")] == list(sizes)
        assert all(
            values[f"{prefix}in_order"] == values[f"{prefix}double"] == 1 for prefix in ("", "split1_", "split2_")
        )
        assert modes == ["eval", "train"]
        assert len(longest) == len(results[0][1])  # as many forward passes on every rank


def test_a_long_evaluation_shows_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All splits together, and on the first rank alone."""
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    for rank in (0, 1):
        evaluate(Engine(), task(7, 1), 2, Ranks(rank, 1, torch.device("cpu")))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1:3] for line in lines] == [[f"{done}/5", "evaluate"] for done in range(1, 6)]


def test_batches_are_of_like_length() -> None:
    engine = Engine()
    evaluate(engine, task(7), 2, Ranks(0, 1, torch.device("cpu")))
    assert engine.longest == [2, 4, 7, 9]


def perplexity_on_ranks(world_size: int) -> dict[str, float]:
    """A model that knows pairs of words, on blocks of which the last one is short."""
    rows = torch.randint(1, 20, (5, 8), generator=torch.Generator().manual_seed(0)).tolist()
    ids = [*rows, rows[0][:3]]
    table = TokenTable(flat({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}))
    table_task = Task(
        "lm", 2, [], {"validation": table}, CausalCollator(0), TokenEvaluation(True), "perplexity", "causal_lm", ()
    )
    pairs = torch.randn(20, 20, generator=torch.Generator().manual_seed(1))

    class Pairs(Engine):
        def __call__(self, **batch: Tensor) -> Any:
            return SimpleNamespace(logits=pairs[batch["input_ids"]])

    rank = torch.distributed.get_rank() if world_size > 1 else 0
    return evaluate(Pairs(), table_task, 2, Ranks(rank, world_size, torch.device("cpu")))


@pytest.mark.parametrize("world_size", [2, 3])
def test_perplexity_weighs_tokens_over_all_ranks(ranks: RankPools, world_size: int) -> None:
    alone = perplexity_on_ranks(1)
    for values in ranks(world_size).run(perplexity_on_ranks, world_size):
        assert values == pytest.approx(alone, rel=1e-9)
