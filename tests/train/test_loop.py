"""What a job leaves behind in the process that ran it."""

from __future__ import annotations

import gc
import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from leap_dist.config.job_file import load_job
from leap_dist.tasks.base import Task
from leap_dist.tasks.lm import CausalCollator, TokenEvaluation
from leap_dist.train.batches import Batches
from leap_dist.train.job import _tokens_per_step
from leap_dist.train.loop import run_job
from leap_dist.train.watch import Stopped, Watch
from leap_dist.zero.ranks import Ranks
from tests.ranks import RankPools
from tests.sweep.jobs import JOB


def linear_during_and_after(file: str, output: str) -> tuple[bool, bool]:
    """Whether torch's own linear is in place while a stage 3 job runs, and after it."""
    own = torch.nn.functional.linear
    during: list[bool] = []
    watch = Watch(notify=lambda *_: during.append(torch.nn.functional.linear is own))
    run_job(load_job(file, []), Path(output), False, Ranks(0, 1, torch.device("cpu")), watch)
    return any(during), torch.nn.functional.linear is own


@pytest.mark.quick
def test_a_stage_3_job_leaves_torchs_linear_as_it_was(tmp_path: Path, ranks: RankPools) -> None:
    file = tmp_path / "job.json"
    file.write_text(json.dumps(JOB | {"zero_optimization": {"stage": 3}}))
    assert ranks(1).run(linear_during_and_after, str(file), str(tmp_path / "run")) == [(False, True)]


def left_in_memory(file: str, output: str) -> list[str]:
    """The engines, optimizers and models that a job leaves, run to its end and stopped at a rung; called on a rank."""
    for name, watch in (("done", Watch()), ("stopped", Watch(may_go_on=lambda *_: False))):
        with suppress(Stopped):
            run_job(load_job(file, []), Path(output, name), False, Ranks.here(), watch)
    gc.collect()
    kinds = ("DeepSpeedEngine", "LeapAdamW", "BertForSequenceClassification")
    return sorted(type(value).__name__ for value in gc.get_objects() if type(value).__name__ in kinds)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_job_leaves_no_engine_in_memory(stage: int, tmp_path: Path, ranks: RankPools) -> None:
    file = tmp_path / "job.json"
    more = {"zero_optimization": {"stage": stage}, "distill": {"teacher": "self"}}
    file.write_text(json.dumps(JOB | more | {"train": {**JOB["train"], "max_steps": 12}}))
    assert ranks(1).run(left_in_memory, str(file), str(tmp_path)) == [[]]


@pytest.mark.parametrize(("given", "expected"), [({}, 4 * 3 * 2 * 16), ({"leap": {"tokens_per_step": 5}}, 5)])
def test_a_language_models_tokens_of_a_step_are_those_of_its_examples(
    tmp_path: Path, given: dict[str, Any], expected: int
) -> None:
    """Over ranks and accumulation; one long conversation, of validation say, made it 64 tokens an example."""
    file = tmp_path / "job.json"
    batch = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3}
    file.write_text(json.dumps(JOB | batch | {"leap": {"target": 0.5, **given.get("leap", {})}}))
    ranks = Ranks(0, 2, torch.device("cpu"))
    rows = [{"input_ids": [1] * size} for size in (8, 24) * 12]
    text = Task("lm", 2, rows, {}, CausalCollator(0), TokenEvaluation(True), "perplexity", "causal_lm", ())
    text = replace(text, max_length=64)
    batches = Batches(text, 4, 3, 17, ranks)
    assert _tokens_per_step(load_job(file, []), text, batches, ranks) == expected
    labels = replace(text, problem="single_label_classification")
    assert _tokens_per_step(load_job(file, []), labels, batches, ranks) == (5 if given else None)
