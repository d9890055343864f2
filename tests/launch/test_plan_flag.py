"""launch/prune.py --plan: the forecast of a job, with nothing loaded and nothing written."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from leap_dist.bench import forecast as forecasts
from leap_dist.bench.forecast import (
    Forecast,
    as_bytes,
    empty_model,
    fewest,
    fit_line,
    forecast,
    gpu_line,
    memory_rows,
)
from leap_dist.config.job_file import load_job
from leap_dist.config.sections import ModelConfig
from leap_dist.errors import UserError
from tests.launch.scripts import load_script
from tests.launch.test_prune import JOB, MODEL

LLAMA_70B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
Plan = Callable[..., int]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Runs launch/prune.py in an empty folder on a job file beside it; the exit code."""

    def run(*arguments: str, **changes: Any) -> int:
        file = tmp_path / "job.json"
        file.write_text(json.dumps(JOB | changes), "utf-8")
        module = load_script("prune")
        folder = tmp_path / "empty"
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["prune", "--config", str(file), *arguments])
        code: int = module.main()
        assert not list(folder.iterdir())
        return code

    return run


def job_of(tmp_path: Path, ranks: int, **changes: Any) -> Forecast:
    file = tmp_path / "job.json"
    file.write_text(json.dumps(JOB | changes), "utf-8")
    return forecast(load_job(file), ranks)


def test_a_forecast_is_printed_and_nothing_written(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    zero = {"stage": 2}
    assert plan("--plan", "4", zero_optimization=zero, leap={"target": 0.3, "gates": ["head", "neuron"]}) == 0
    shown = capsys.readouterr().out
    for words in ("bert: ", " prunable; ZeRO stage 2, 32-bit, 4 ranks", "head ", "neuron ", "LEAP's own"):
        assert words in shown
    for words in ("gradients reduced", "weights gathered", "masks of units", "of the reduction", "this machine: fits"):
        assert words in shown
    assert "GPUs of 80 GB, at stage 2: 1, dense 1; stage 3: 1, dense 1" in shown


def test_the_launcher_gives_the_number_of_ranks(
    plan: Plan, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert plan("--plan") == 0
    assert "32-bit, 1 rank\n" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert plan("--plan") == 0
    assert "32-bit, 3 ranks\n" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    assert plan("--plan") == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("more", [["--resume"], ["--output", "run"]])
def test_it_starts_no_run_to_resume_or_write(plan: Plan, capsys: pytest.CaptureFixture[str], more: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        plan("--plan", "2", *more)
    assert ended.value.code == 2
    assert "--plan starts no run: it can be combined with --config and --set only" in capsys.readouterr().err


@pytest.mark.parametrize("gates", ["element", "block:8x8"])
def test_seventy_billion_parameters_take_seconds(plan: Plan, capsys: pytest.CaptureFixture[str], gates: str) -> None:
    zero, half, leap = {"stage": 3}, {"enabled": True}, {"target": 0.3, "gates": [gates]}
    started = time.process_time()
    assert plan("--plan", "64", model={"from_config": LLAMA_70B}, zero_optimization=zero, bf16=half, leap=leap) == 0
    assert time.process_time() - started < 30
    shown = capsys.readouterr().out
    assert "llama: 69,503,049,728 parameters, 68,451,041,280 prunable; ZeRO stage 3, 16-bit, 64 ranks" in shown
    assert "this machine: does not fit" in shown
    advised = "LEAP sends 3.2% of the gradients' bytes, for 1,069,547,520 units; larger blocks send less"
    assert (advised in shown) == (gates == "block:8x8")


def test_a_teacher_and_what_is_compared_with_it_are_counted(tmp_path: Path) -> None:
    alone = job_of(tmp_path, 2, zero_optimization={"stage": 2})
    numel = sum(p.numel() for p in alone.model.parameters())
    for stage, parts in ((2, 1), (3, 2)):
        zero = {"zero_optimization": {"stage": stage}}
        taught = job_of(tmp_path, 2, **zero, distill={"teacher": "self", "attention_weight": 0.0})
        more = taught.memory(2, stage).total - job_of(tmp_path, 2, **zero).memory(2, stage).total
        assert more == 4 * -(-numel // parts) and taught.passes.total == alone.passes.total
    unfused = job_of(tmp_path, 2, distill={"teacher": "self"})
    assert unfused.passes.activations > alone.passes.activations and "teacher's pass" in unfused.passes.said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_batch_size": 33}, r"train_batch_size: got 33; allowed: \d+, as 2 ranks with .* or leave it out"),
        (
            {"data": {"task": "mlm", "max_length": 4096}},
            r"max_position_embeddings is \d+; allowed: at least 4096, mlm has",
        ),
    ],
)
def test_what_a_run_would_refuse_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        job_of(tmp_path, 2, **changes)


def test_a_folder_without_weights_will_do(plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL), "utf-8")
    data = {"task": "glue/mnli"}
    assert plan("--plan", model={"name": str(folder)}, data=data) == 0
    three = capsys.readouterr().out
    assert plan("--plan", model={"from_config": MODEL}) == 0
    two = capsys.readouterr().out
    more = MODEL["hidden_size"] + 1  # a class more in the head
    assert _parameters(three) == _parameters(two) + more


@pytest.mark.parametrize(
    ("task", "config", "head"),
    [
        ("glue/stsb", MODEL, "BertForSequenceClassification"),
        ("squad", MODEL, "BertForQuestionAnswering"),
        ("lm", LLAMA_70B, "LlamaForCausalLM"),
        ("mlm", MODEL, "BertForMaskedLM"),
    ],
)
def test_the_head_is_the_tasks(tmp_path: Path, task: str, config: dict[str, Any], head: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    for model in (ModelConfig(name=str(tmp_path)), ModelConfig(from_config=config)):
        built = empty_model(model, task)
        assert type(built).__name__ == head and built.device.type == "meta"


def test_a_broken_config_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODEL | {"num_attention_heads": 3}), "utf-8")
    with pytest.raises(UserError, match="transformers cannot build a model from its config: "):
        empty_model(ModelConfig(name=str(tmp_path)), "squad")


def _parameters(shown: str) -> int:
    return int(shown.split(" parameters")[0].split()[-1].replace(",", ""))


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (["--plan", "0"], {}, "--plan: got 0; allowed: a number of ranks >= 1"),
        (["--plan"], {"data": {"task": "glue/sst3"}}, 'data.task: got "glue/sst3"; allowed: '),
        (["--plan"], {"model": {"name": "/no/such"}}, 'model.name: got "/no/such"; there is no such folder'),
        (["--plan"], {"leap": {"target": 0.3, "gates": ["expert"]}}, "leap.gates[0]: got 'expert'; bert has none"),
        (
            ["--plan"],
            {"zero_optimization": {"reduce_bucket_size": "auto"}},
            'zero_optimization.reduce_bucket_size: got "auto"; allowed: a number >= 1; or leave it out',
        ),
        (
            ["--plan"],
            {"zero_optimization": {"allgather_bucket_size": 0}},
            "zero_optimization.allgather_bucket_size: got 0; allowed: a number >= 1; or leave it out",
        ),
        (
            ["--plan", "2", "--set", "zero_optimization.offload_optimizer=cpu"],
            {},
            'zero_optimization.offload_optimizer: got "cpu"; allowed: a JSON object, such as {"device": "cpu"}; or ',
        ),
        (
            ["--plan"],
            {"bf16": {"enabled": True}},
            "bf16.enabled: zero_optimization.stage 0 hides its fp32 master weights",
        ),
        (
            ["--plan"],
            {"leap": {"target": 0.5, "measure": "latency", "latency_table": "/no/such", "gates": ["head"]}},
            "leap.latency_table: got /no/such; there is no such file; make it with ",
        ),
        (
            ["--plan"],
            {"leap": {"target": 0.05, "measure": "flops", "gates": ["neuron"]}},
            "leap.target: 0.05 cannot be reached: with the fewest units that every gate keeps the lowest possible ",
        ),
        (
            ["--plan"],
            {"leap": {"target": 0.9, "gates": ["2:4"]}},
            "leap.target: 0.9 cannot be reached: with its n:m pattern the highest possible density is 0.5",
        ),
        (
            ["--plan"],
            {"leap": {"target": 0.5, "gates": ["head"], "score_init": "syntax"}},
            'leap.score_init: got "syntax", but data.task builtin/clock has no texts; choose a task of texts, or set ',
        ),
    ],
)
def test_what_the_job_would_be_refused_for(
    plan: Plan, capsys: pytest.CaptureFixture[str], arguments: list[str], changes: dict[str, Any], message: str
) -> None:
    assert plan(*arguments, **changes) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: {message}") and shown.out == ""


def test_memory_falls_with_ranks_and_stage(tmp_path: Path) -> None:
    job = job_of(tmp_path, 2, zero_optimization={"stage3_param_persistence_threshold": 0})
    for stage in (1, 2, 3):
        held = [job.memory(ranks, stage).total for ranks in (1, 2, 4, 1024)]
        assert held == sorted(held, reverse=True)
        assert job.memory(2, stage, dense=True).total < job.memory(2, stage).total
    assert job.memory(8, 3).total < job.memory(8, 2).total < job.memory(8, 1).total


def test_gpus_are_the_fewest_that_hold_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fewest(lambda ranks: ranks >= 1) == 1
    assert fewest(lambda ranks: ranks >= 37) == 37
    assert fewest(lambda ranks: False) is None
    job = job_of(tmp_path, 1, zero_optimization={"stage": 1})
    monkeypatch.setattr(forecasts, "GPU", job.memory(5, 1).total + job.passes.total)
    assert job.gpus(1) == 5
    monkeypatch.setattr(forecasts, "GPU", 1000)
    assert gpu_line(job) == "GPUs of 1 kB, at stage 1: no number is enough, dense no number is enough; stage 3: no " + (
        "number is enough, dense no number is enough"
    )


def test_offloaded_state_is_not_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    job = job_of(tmp_path, 2, zero_optimization=zero)
    assert [row[""] for row in memory_rows(job)][-2:] == ["of it on the GPU", "host memory for checkpoints"]
    needed = job.memory(2, 2).on_device(frozenset({"state"})) + job.passes.total
    monkeypatch.setattr(forecasts, "machine_memory", lambda: ("GPU Z", 2, needed))
    assert fit_line(job).startswith("this machine: fits: ")
    monkeypatch.setattr(forecasts, "machine_memory", lambda: ("GPU Z", 1, needed))
    assert fit_line(job).startswith("this machine: does not fit: ")


def test_a_machine_has_to_hold_passes_and_copies_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"task": "lm", "train": "a.txt", "validation": "b.txt", "max_length": 64}
    job = job_of(tmp_path, 2, data=data, model={"from_config": LLAMA_70B | {"num_hidden_layers": 1}})
    held, copied = job.memory(2, job.hosting.stage), job.memory(2, job.hosting.stage).copy
    assert job.passes.activations > 0 and job.passes.logits > 0 and copied > 0
    needed = 2 * (held.total + job.passes.total + copied)
    for room, verdict in ((needed, "fits"), (needed - 1, "does not fit")):
        monkeypatch.setattr(forecasts, "machine_memory", lambda room=room: ("memory", 1, room))
        assert fit_line(job).startswith(f"this machine: {verdict}: ")


def test_this_machines_memory_heeds_a_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(forecasts, "CGROUP_LIMIT", limit)
    for text, expected in ((None, physical), ("max\n", physical), ("12345\n", 12345)):
        if text is not None:
            limit.write_text(text)
        assert forecasts.machine_memory() == ("memory", 1, expected)


def test_bytes_are_decimal() -> None:
    assert [as_bytes(n) for n in (0, 999, 1500, 80 * 10**9, 2_550_000_000_000)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "80 GB",
        "2.55 TB",
    ]


def test_one_shot_keeps_no_activations(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--plan", leap={"target": 0.3, "mode": "one_shot"}) == 0
    assert "a micro-batch of 8 x 16 tokens, which passes without gradients" in capsys.readouterr().out


def held_for_real(model: Any, **inputs: Any) -> int:
    """Bytes that autograd keeps of a forward pass with values, the weights left out."""
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    held: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: held.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        model.base_model(**inputs)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in held.items() if place not in own)


def test_an_encoder_decoder_is_counted_on_both_sides() -> None:
    from transformers import T5Config, T5ForSequenceClassification

    from leap_dist.bench.activations import activation_bytes

    config = T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=2, d_kv=16, vocab_size=100)
    with torch.device("meta"):
        counted = activation_bytes(T5ForSequenceClassification(config), 2, 16, torch.float32)
    ids = torch.zeros(2, 16, dtype=torch.int64)
    real = held_for_real(T5ForSequenceClassification(config).train(), input_ids=ids, decoder_input_ids=ids)
    assert counted == pytest.approx(real, rel=0.1)


def test_activations_are_those_that_a_forward_pass_keeps(tmp_path: Path) -> None:
    from leap_dist.bench.activations import activation_bytes

    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ModelConfig(from_config=LLAMA_70B | small | {"num_key_value_heads": 2, "vocab_size": 100})
    counted = activation_bytes(empty_model(config, "lm"), 2, 32, torch.float32)
    longer = activation_bytes(empty_model(config, "lm"), 2, 64, torch.float32)
    assert longer == pytest.approx(2 * counted, rel=0.01)  # attention is fused
    model = type(empty_model(config, "lm"))(empty_model(config, "lm").config).train()
    real = held_for_real(model, input_ids=torch.zeros(2, 32, dtype=torch.int64))
    assert counted == pytest.approx(real, rel=0.1)
