"""Medians of interleaved calls, threads, and the answer of a model."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import torch

from leap_dist.export import latency
from leap_dist.export.latency import logits_of, medians, torch_runner, torch_threads
from leap_dist.machine import machine
from tests.export.runs import classifier


def test_each_runner_is_called_as_often_and_the_order_changes() -> None:
    calls: list[str] = []

    def runner(name: str) -> latency.Runner:
        def run(inputs: object) -> torch.Tensor:
            calls.append(name)
            return torch.empty(0)

        return run

    found = medians({name: runner(name) for name in "abc"}, {}, budget=0.0)
    assert set(found) == set("abc") and all(value >= 0 for value in found.values())
    rounds = 2 * latency.MIN_ROUNDS  # a call before each that is measured
    assert Counter(calls) == dict.fromkeys("abc", rounds + 1)
    firsts = {calls[start] for start in range(3, len(calls), 6)}
    assert len(firsts) > 1


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_a_runner_evaluates_without_autograd() -> None:
    model = classifier().train()
    ids = torch.arange(1, 9).view(1, 8)
    run = torch_runner(model)
    assert not model.training and not run({"input_ids": ids}).requires_grad
    assert torch.equal(run({"input_ids": ids}), model(input_ids=ids).logits)


def test_span_models_answer_with_start_and_end() -> None:
    start, end = torch.zeros(2, 5), torch.ones(2, 5)
    answer = logits_of(SimpleNamespace(start_logits=start, end_logits=end))
    assert answer.shape == (2, 5, 2) and torch.equal(answer[..., 1], end)


def test_the_machine_is_named() -> None:
    found = machine()
    assert found["processor"] and found["cores"] >= 1
    assert {"torch", "transformers", "python"} <= found["versions"].keys()
