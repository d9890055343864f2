"""Medians of interleaved calls, threads, and the answer of a model."""

from __future__ import annotations

import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from leap_dist.export import latency
from leap_dist.export.latency import logits_of, medians, torch_runner, torch_threads
from leap_dist.machine import machine
from tests.export.runs import classifier, language_model


def recorder(calls: list[str], name: str, seconds: float = 0.0) -> latency.Runner:
    def run(inputs: object) -> torch.Tensor:
        calls.append(name)
        time.sleep(seconds)
        return torch.empty(0)

    return run


def test_each_runner_is_called_as_often_and_the_order_changes() -> None:
    calls: list[str] = []
    found = medians({name: recorder(calls, name) for name in "abc"}, {}, budget=60.0)
    assert set(found) == set("abc") and all(value >= 0 for value in found.values())
    assert Counter(calls) == dict.fromkeys("abc", 1 + latency.CALLS * latency.MAX_ROUNDS)
    assert len({calls[start] for start in range(3, len(calls), 3 * latency.CALLS)}) > 1


def test_rounds_keep_to_the_budget_from_the_first_on() -> None:
    """First calls of 40 ms: no round of 120 ms is begun that would end behind the budget."""
    for budget, rounds in ((0.1, 0), (0.3, 2)):
        calls: list[str] = []
        started = time.perf_counter()
        found = medians({"a": recorder(calls, "a", 0.04)}, {}, budget)
        assert len(calls) <= 1 + latency.CALLS * rounds and len(calls) % latency.CALLS == 1
        assert time.perf_counter() - started < 0.06 + budget + 0.2
        assert found["a"] >= 40.0


def test_it_is_torchs_timer_that_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for a GPU, and it sets the threads itself: those that are set must stay."""
    threads: list[int] = []
    with torch_threads(torch.get_num_threads() + 1):
        expected = torch.get_num_threads()
        medians({"a": lambda _: threads.append(torch.get_num_threads()) or torch.empty(0)}, {})  # type: ignore[func-returns-value]
    assert set(threads) == {expected}
    assert latency.Timer is torch.utils.benchmark.Timer


def test_a_language_model_gives_its_last_logits_alone() -> None:
    model, ids = language_model(), torch.arange(1, 9).view(2, 4)
    full = torch_runner(model)({"input_ids": ids})
    assert full.shape == (2, 4, 40)
    torch.testing.assert_close(torch_runner(model, last=True)({"input_ids": ids}), full[:, -1:])
    assert torch_runner(classifier(), last=True)({"input_ids": ids}).shape == (2, 3)


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
