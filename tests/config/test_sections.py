"""The job file: what is accepted, and that every problem is reported, once, in one error."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from leap_dist.config import job_file, sections
from leap_dist.config.job_file import load_job, parse_job, parse_leap
from leap_dist.config.leap import GateConfig, LeapConfig
from leap_dist.config.sections import JobConfig
from leap_dist.errors import UserError

CONFIGS = sorted(file for file in job_file.CONFIG_FOLDER.glob("*.json") if not file.stem.startswith("sweep_"))


def job(**changes: Any) -> dict[str, Any]:
    """A small valid job with some top-level keys replaced; None removes one."""
    raw: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "model": {"name": "bert-base-uncased"},
        "data": {"task": "glue/sst2"},
        "train": {"epochs": 3},
        "leap": {"target": 0.1},
        **changes,
    }
    return {key: value for key, value in raw.items() if value is not None}


def write(folder: Path, text: str) -> Path:
    file = folder / "job.json"
    file.write_text(text, "utf-8")
    return file


# ------------------------------------------------------------------------------ accepted


def test_runs_go_where_mlflows_own_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert parse_job(job()).tracking.mlflow_uri == "sqlite:///mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert parse_job(job()).tracking.mlflow_uri == "http://127.0.0.1:5000"
    assert parse_job(job(tracking={"mlflow_uri": None})).tracking.mlflow_uri is None


def test_defaults_of_leap_are_pinned() -> None:
    defaults = parse_leap({"target": 0.25}).model_dump()
    assert {key: defaults[key] for key in ("target", "gates", "rule", "control", "temperature")} == {
        "target": 0.25,
        "gates": ["element"],
        "rule": "leap",
        "control": "projected",
        "temperature": 32.0,
    }
    assert set(defaults) == {
        "target", "gates", "rule", "control", "temperature", "score_init", "syntax_model", "score_learning_rate",
        "threshold_learning_rate", "lambda_max", "lambda_min", "dense_fraction", "settle_fraction",
        "include", "exclude", "total_steps", "tokens_per_step", "mode", "start", "calibration_batches", "measure",
        "weights", "permute", "prior_mask", "latency_table", "latency_batch", "latency_length", "score_moments",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "moments"),
    [
        ({}, "shared"),
        ({"rule": "movement", "gates": ["row", "2:4"]}, "shared"),
        ({"gates": ["row"]}, "own"),
        ({"rule": "magnitude"}, "own"),
        ({"rule": "gumbel"}, "own"),
        ({"weights": "frozen"}, "own"),
        ({"mode": "one_shot"}, "own"),
    ],
)
def test_moments_are_shared_where_they_can_be(changes: dict[str, Any], moments: str) -> None:
    """What a job is written with can be given again."""
    config = parse_leap({"target": 0.5, **changes})
    assert config.score_moments == moments
    assert parse_leap(config.model_dump(mode="json")) == config


def test_defaults_of_train_are_pinned() -> None:
    assert parse_job(job()).train.model_dump() == {
        "epochs": 3, "max_steps": None, "learning_rate": 3e-5, "weight_decay": 0.01, "warmup_fraction": 0.1,
        "seed": 17, "dense_reference": False, "checkpoint_every": None, "checkpoint_minutes": 30.0,
        "keep_checkpoints": 2, "max_bad_steps": 10, "collective_timeout": 30.0, "log_every": 10,
        "eval_batch_size": 64,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "target", "rate"), [("auto", 0.5, 2e-3), ("auto", 0.1, 1e-2), ("auto", 0.03, 1e-2), (5e-3, 0.5, 5e-3)]
)
def test_the_rate_of_scores_follows_from_the_target(given: float | str, target: float, rate: float) -> None:
    leap = parse_leap({"target": target, "score_learning_rate": given})
    assert leap.score_rate(elementwise=True) == pytest.approx(rate)
    assert leap.score_rate(elementwise=False) == (1e-2 if given == "auto" else given)


def test_resolved_is_json_and_parses_to_the_same_job() -> None:
    gates = ["element", "block:16x8"]
    parsed = parse_job(job(bf16={"enabled": True}, leap={"target": 1, "gates": gates, "include": "re:.*weight"}))
    resolved = json.loads(json.dumps(parsed.resolved()))
    assert parse_job(resolved) == parsed
    assert resolved["bf16"] == {"enabled": True}
    assert resolved["leap"]["temperature"] == 32.0
    assert resolved["train"]["max_steps"] is None


def test_resolved_is_a_copy() -> None:
    parsed = parse_job(job(zero_optimization={"stage": 2}))
    parsed.resolved()["zero_optimization"]["stage"] = 3
    assert parsed.deepspeed["zero_optimization"] == {"stage": 2}


def test_every_deepspeed_key_is_accepted_and_kept() -> None:
    kept = [key for key in sections.DEEPSPEED_KEYS if key not in ("optimizer", "zero_optimization")]
    extra: dict[str, Any] = {key: {} for key in kept}
    extra |= {"train_micro_batch_size_per_gpu": 8, "managed_gradient_accumulation": True}
    assert parse_job(job(**extra)).deepspeed == extra


@pytest.mark.parametrize("gate", ["element", "row", "column", "block:1x1", "block:32x16"])
def test_one_gate_may_be_a_plain_string(gate: str) -> None:
    assert parse_leap({"target": 0.5, "gates": gate}).gates == (GateConfig(granularity=gate),)


def test_jobs_are_frozen() -> None:
    parsed = parse_job(job())
    with pytest.raises(ValidationError, match="frozen"):
        parsed.leap.target = 0.5


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_file_in_configs_is_valid(file: Path) -> None:
    assert isinstance(load_job(file.stem), JobConfig)


LANGUAGE_MODELS = ("gemma3_270m", "gemma3_1b", "qwen3_0.6b", "llama3.2_1b")
VARIANTS = (["leap.gates=2:4"], ["leap.target=0.75", 'leap.gates=["head","neuron"]'])


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_recipes_of_language_models_take_their_variants(name: str) -> None:
    element, pattern, parts = (load_job(name, changes).leap for changes in ([], *VARIANTS))
    assert (element.target, pattern.gates[0].granularity) == (0.5, "2:4")
    assert (parts.target, [gate.granularity for gate in parts.gates]) == (0.75, ["head", "neuron"])


# ------------------------------------------------------------------------------ refused

REFUSED = {
    "target zero": ({"leap": {"target": 0}}, r"leap\.target: got 0; allowed: a number, 0 < target <= 1"),
    "target above one": ({"leap": {"target": 1.5}}, r"leap\.target: got 1\.5; allowed"),
    "target in words": ({"leap": {"target": "ten"}}, r'leap\.target: got "ten"; allowed'),
    "target as a string": ({"leap": {"target": "0.5"}}, r'leap\.target: got "0\.5"; allowed'),
    "target not a number": ({"leap": {"target": float("nan")}}, r"leap\.target: got NaN; allowed"),
    "no target": ({"leap": {}}, r"leap\.target: missing; allowed"),
    "no leap": ({"leap": None}, r"leap\.target: missing"),
    "unknown key": (
        {"leap": {"target": 0.1, "temprature": 3}},
        r"leap\.temprature: got 3, unknown key; .*did you mean leap\.temperature\?",
    ),
    "key of another section": (
        {"leap": {"target": 0.1, "learning_rate": 3}},
        r"leap\.learning_rate: .*did you mean train\.learning_rate\?",
    ),
    "unknown section": ({"laep": {}}, r"laep: got \{\}, unknown key; .*did you mean leap\?"),
    "key without its section": ({"target": 0.1}, r"target: .*did you mean leap\.target\?"),
    "DeepSpeed key misspelt": (
        {"gradient_cliping": 1.0},
        r"gradient_cliping: .*did you mean gradient_clipping\?",
    ),
    "unknown gate": (
        {"leap": {"target": 0.1, "gates": ["row", "colum"]}},
        r'leap\.gates\[1\]: got "colum"; allowed: one or more of element, row, .*; did you mean column',
    ),
    "block without a size": (
        {"leap": {"target": 0.1, "gates": "block:0x4"}},
        r'leap\.gates\[0\]: got "block:0x4"',
    ),
    "a gate twice": ({"leap": {"target": 0.1, "gates": ["row", "row"]}}, r"leap\.gates: .*may be given once"),
    "no gate": ({"leap": {"target": 0.1, "gates": []}}, r"leap\.gates: got \[\]; allowed: one or more"),
    "unknown rule": (
        {"leap": {"target": 0.1, "rule": "leep"}},
        r'leap\.rule: got "leep"; .*did you mean leap\?',
    ),
    "broken pattern": (
        {"leap": {"target": 0.1, "include": ["re:("]}},
        r"leap\.include\[0\]: .*not a regular exp",
    ),
    "negative rate": (
        {"leap": {"target": 0.1, "threshold_learning_rate": -1}},
        r'leap\.threshold_learning_rate: got -1; allowed: a number > 0, or "auto"',
    ),
    "a rate that fp32 takes as infinite": (
        {"leap": {"target": 0.1, "score_learning_rate": 1e39}},
        r"leap\.score_learning_rate: got 1e\+39 \(fp32 holds 1\.2e-38 to 3\.4e\+38\); allowed: a number > 0, or",
    ),
    "a temperature that fp32 takes as 0": (
        {"distill": {"teacher": "self", "temperature": 1e-46}},
        r"distill\.temperature: got 1e-46 \(fp32 holds .*\); allowed: a number > 0",
    ),
    "lambdas crossed": (
        {"leap": {"target": 0.1, "lambda_min": 20, "lambda_max": 10}},
        r"leap\.lambda_min: got 20; allowed: at most lambda_max, which is 10",
    ),
    "no step left to prune": (
        {"leap": {"target": 0.1, "dense_fraction": 0.8}},
        r"leap\.dense_fraction: got 0\.8; allowed: dense_fraction \+ settle_fraction < 1, and .* is 0\.2",
    ),
    "too few steps": (
        {"leap": {"target": 0.1, "total_steps": 9}},
        r"leap\.total_steps: got 9; allowed: an integer >= 10",
    ),
    "two lengths": (
        {"leap": {"target": 0.1, "total_steps": 20}, "train": {"max_steps": 30}},
        r"leap\.total_steps: got 20; allowed: train\.max_steps, which is 30",
    ),
    "no model": ({"model": None}, r"model: got neither of name and from_config; allowed: exactly one"),
    "two models": (
        {"model": {"name": "x", "from_config": {"model_type": "bert"}}},
        r"model: got both of name and from_config; allowed: exactly one",
    ),
    "no architecture": ({"model": {"from_config": {}}}, r"model\.from_config\.model_type: got nothing"),
    "no length": ({"train": {}}, r"train: got neither of epochs and max_steps"),
    "a truth for an integer": (
        {"train": {"max_steps": True}},
        r"train\.max_steps: got true; allowed: an integer",
    ),
    "a float for an integer": (
        {"train": {"max_steps": 5.0}},
        r"train\.max_steps: got 5\.0; allowed: an integer",
    ),
    "fewer steps than phases need": (
        {"train": {"max_steps": 9}},
        r"train\.max_steps: got 9; allowed: an integer >= 10, or null",
    ),
    "no minutes": (
        {"train": {"max_steps": 20, "checkpoint_minutes": 0}},
        r"train\.checkpoint_minutes: got 0; allowed: a number > 0, or null",
    ),
    "no checkpoint kept": (
        {"train": {"max_steps": 20, "keep_checkpoints": 0}},
        r"train\.keep_checkpoints: got 0; allowed: an integer >= 1",
    ),
    "no bad step": (
        {"train": {"max_steps": 20, "max_bad_steps": 0}},
        r"train\.max_bad_steps: got 0; allowed: an integer >= 1",
    ),
    "no timeout": (
        {"train": {"max_steps": 20, "collective_timeout": -1}},
        r"train\.collective_timeout: got -1; allowed: a number > 0",
    ),
    "one file": (
        {"data": {"task": "glue/sst2", "train": "a.tsv"}},
        r"data\.validation: missing; local files come in pairs",
    ),
    "columns without files": (
        {"data": {"task": "glue/sst2", "label": "y"}},
        r'data\.label: got "y"; columns are for local files',
    ),
    "files for a builtin task": (
        {"data": {"task": "builtin/clock", "train": "a.tsv"}},
        r'data\.train: got "a\.tsv"; a builtin task generates its data',
    ),
    "a warm-up beside a scheduler": (
        {"scheduler": {"type": "WarmupLR"}, "train": {"max_steps": 20, "warmup_fraction": 0.3}},
        r"train\.warmup_fraction: got 0\.3, which has no effect here: the scheduler section says what the rate does",
    ),
    "an old config": (
        {"compression_training": {"sparse_pruning": {}}},
        r"compression_training: what DeepSpeed pruned by; make a job .* --import-compression FILE",
    ),
    "three text columns": (
        {"data": {"task": "glue/sst2", "train": "a.tsv", "validation": "b.tsv", "text": ["a", "b", "c"]}},
        r"data\.text: got .*; allowed: one or two column names",
    ),
    "section is not an object": (
        {"tracking": 3},
        r"tracking: got 3; allowed: a JSON object with keys mlflow_uri",
    ),
    "an optimizer": ({"optimizer": {"type": "AdamW"}}, r"optimizer: got .*LEAP is the optimizer: remove it"),
    "no batch size": (
        {"train_micro_batch_size_per_gpu": None},
        r"train_micro_batch_size_per_gpu: missing; allowed: an integer >= 1",
    ),
    "batch size zero": (
        {"train_micro_batch_size_per_gpu": 0},
        r"train_micro_batch_size_per_gpu: got 0; allowed",
    ),
    "stage five": (
        {"zero_optimization": {"stage": 5}},
        r"zero_optimization\.stage: got 5; allowed: 0, 1, 2 or 3",
    ),
    "stage as a truth": ({"zero_optimization": {"stage": True}}, r"zero_optimization\.stage: got true"),
    "ZeRO is not an object": ({"zero_optimization": 2}, r"zero_optimization: got 2; allowed: a JSON object"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_job(job(**changes), "here.json")
    assert str(caught.value).startswith("here.json: 1 problem\n")


def test_every_problem_is_in_one_error() -> None:
    raw = job(laep={}, zero_optimization={"stage": 5}, train={"epochs": "3"}, leap={"target": "ten", "gates": "ro"})
    with pytest.raises(UserError, match="config: 5 problems") as caught:
        parse_job(raw)
    keys = [line.strip().split(":")[0] for line in str(caught.value).splitlines()[1:]]
    assert keys == ["laep", "zero_optimization.stage", "train.epochs", "leap.target", "leap.gates[0]"]


def test_a_job_is_an_object() -> None:
    with pytest.raises(UserError, match=r"config: got \[1\]; allowed: a JSON object"):
        parse_job([1])  # type: ignore[arg-type]


def test_parse_leap_names_the_section() -> None:
    with pytest.raises(UserError, match=r"leap: 1 problem\n  leap\.target: got 2"):
        parse_leap({"target": 2})


def test_conflicts_hold_for_a_section_built_in_code() -> None:
    with pytest.raises(ValidationError, match=r"dense_fraction \+ settle_fraction < 1"):
        LeapConfig(target=0.1, dense_fraction=0.9)


# ------------------------------------------------------------------------------ files and overrides


def test_overrides_are_json_or_plain_strings(tmp_path: Path) -> None:
    file = write(tmp_path, json.dumps(job()))
    overrides = [
        "leap.target=0.05",
        "leap.gates=row",
        "zero_optimization.stage=3",
        "tracking.mlflow_uri=null",
    ]
    parsed = load_job(file, overrides)
    assert (parsed.leap.target, parsed.leap.gates) == (0.05, (GateConfig(granularity="row"),))
    assert parsed.deepspeed["zero_optimization"] == {"stage": 3}
    assert parsed.tracking.mlflow_uri is None


def test_null_removes_what_it_is_no_value_of(tmp_path: Path) -> None:
    file = write(tmp_path, json.dumps(job() | {"bf16": {"enabled": True}, "distill": {"alpha": 0.5}}))
    parsed = load_job(file, ["bf16=null", "leap.gates=null", "distill.alpha=null"])
    assert "bf16" not in parsed.deepspeed and parsed.leap.gates == (GateConfig(granularity="element"),)
    assert parsed.distill is not None and parsed.distill.alpha == 0.9
    assert load_job(file, ["distill=null"]).distill is None
    assert load_job(write(tmp_path, json.dumps(job())), ["distill.alpha=null"]).distill is None  # nothing is made
    with pytest.raises(UserError, match=r"leap\.target: missing"):
        load_job(file, ["leap.target=null"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("leap.target", r'override: got "leap\.target"; allowed: section\.key=value'),
        (".target=1", r'override: got "\.target=1"; allowed: section\.key=value'),
        ("leap.target.x=1", r"leap\.target holds 0\.1, which has no keys"),
        ("leap.target=ten", r'leap\.target: got "ten"'),
        ("leap.targte=0.1", r"leap\.targte: got 0\.1, unknown key; .*did you mean leap\.target\?"),
        (
            "leap.gates[0]=head",
            r"override: got \"leap\.gates\[0\]=head\"; a list is given whole: --set 'leap\.gates=\[",
        ),
        ("managed_gradient_accumulation=false", r"managed_gradient_accumulation: got false; allowed: true: each micro"),
        ("bf16.enabled=False", r'bf16\.enabled: got "False"; allowed: true or false'),
    ],
)
def test_refused_override(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_job(write(tmp_path, json.dumps(job())), [override])


def test_a_sweep_is_no_job() -> None:
    with pytest.raises(
        UserError, match=r"^config: .*sweep_ratios\.json is a sweep, not a job; start it with launch/sw"
    ):
        load_job("sweep_ratios.json")


def test_a_bare_name_is_looked_up_in_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_file, "CONFIG_FOLDER", tmp_path)
    write(tmp_path, json.dumps(job()))
    assert load_job("job") == load_job("job.json") == load_job(tmp_path / "job.json")


def test_a_file_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_file, "CONFIG_FOLDER", tmp_path)
    write(tmp_path, "{}")
    with pytest.raises(UserError, match=r"config: no file jbo\.json; .*did you mean job\.json\?"):
        load_job("jbo.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"leap": }', r"job\.json: not JSON: line 1, column 10"),
        ("[1]", r"job\.json: got \[1\]; allowed: a JSON object"),
        ('{"a": 1, "a": 2}', r"job\.json: the same key is given twice: a"),
        ('{"a": NaN}', r"job\.json: NaN is not JSON"),
    ],
)
def test_a_file_that_is_not_a_config(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_job(write(tmp_path, text))


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    file.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UserError, match=r"not UTF-8 text: .* at byte 7"):
        load_job(file)


# ------------------------------------------------------------------------------ gates with options, families


def test_a_gate_with_options_is_an_object_and_one_without_a_string() -> None:
    gates = ["head", {"granularity": "neuron", "multiple_of": 64, "uniform": True, "exclude": ["re:.*0"]}]
    parsed = parse_job(job(leap={"target": 0.5, "gates": gates}))
    assert parsed.leap.gates[1].multiple_of == 64
    assert parsed.resolved()["leap"]["gates"] == gates
    assert parse_job(parsed.resolved()) == parsed


@pytest.mark.parametrize(
    ("gates", "match"),
    [
        (["heads"], r'leap\.gates\[0\]: got "heads"; allowed: .*; did you mean head\?'),
        (["4:2"], r'leap\.gates\[0\]: got "4:2"'),
        ([{"multiple_of": 8}], r"leap\.gates\[0\]\.granularity: missing; allowed: one of element, row"),
        ([{"granularity": "neurn"}], r'leap\.gates\[0\]\.granularity: got "neurn".*did you mean neuron\?'),
        ([{"granularity": "head", "min_keep": 0}], r"leap\.gates\[0\]\.min_keep: got 0; allowed: an integer >= 1"),
        (
            [{"granularity": "head", "min_kept": 2}],
            r"leap\.gates\[0\]\.min_kept: got 2, unknown key; .*mean min_keep\?",
        ),
        ([{"granularity": "2:4", "uniform": True}], r"leap\.gates\[0\]\.uniform: got true; an n:m pattern keeps n of"),
        ([7], r"leap\.gates\[0\]: got 7; allowed: "),
    ],
)
def test_refused_gates(gates: list[Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        parse_job(job(leap={"target": 0.5, "gates": gates}))


FAMILY = {
    "layers": "re:blocks.[0-9]+",
    "attention": {"module": "attn", "qkv": "attn.qkv", "output": "attn.out", "head_size": 16},
    "ffn": [{"up": "up", "down": "down"}],
}


def test_a_family_section_is_kept_and_none_is_needed() -> None:
    parsed = parse_job(job(family=FAMILY))
    assert parsed.family is not None and parsed.family.attention[0].head_size == 16
    assert parse_job(parsed.resolved()) == parsed
    assert parse_job(job()).family is None and "family" not in parse_job(job()).resolved()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"layers": []}, r"family\.layers: got \[\]; allowed: module paths"),
        ({"ffn": [{"up": "up"}]}, r"family\.ffn\[0\]\.down: missing; allowed: the module that maps"),
        (
            {"attention": {**FAMILY["attention"], "key": "k"}},
            r"family\.attention\[0\]\.qkv: got key and qkv; allowed: qkv",
        ),
        (
            {"attention": {**FAMILY["attention"], "outptu": "o"}},
            r"family\.attention\[0\]\.outptu: .*did you mean output\?",
        ),
        ({"mlp": {}}, r"family\.mlp: got {}, unknown key"),
    ],
)
def test_refused_families(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        parse_job(job(family={**FAMILY, **changes}))


OTHER: dict[str, Any] = {  # a value of every key of the leap section that is not its default
    "control": "paper", "temperature": 16.0, "score_init": "zero", "score_learning_rate": 0.02,
    "threshold_learning_rate": 0.5, "lambda_max": 100.0, "lambda_min": 5.0, "dense_fraction": 0.1,
    "settle_fraction": 0.3, "include": ["a.weight"], "exclude": ["b.weight"], "total_steps": 100, "target": 0.3,
    "calibration_batches": 4, "latency_table": "a.json", "latency_batch": 8, "latency_length": 64,
}  # fmt: skip
ALWAYS = {"dense_fraction", "settle_fraction", "include", "exclude", "total_steps", "target", "score_init"}
SCORED = ALWAYS | {"score_learning_rate"}
READ: dict[str, set[str]] = {  # by rule, control and gates: the keys that have an effect, alone
    "leap projected element": SCORED | {"control", "threshold_learning_rate"},
    "leap projected row": SCORED | {"control", "threshold_learning_rate"},
    "leap projected 2:4": SCORED | {"control"},  # a control is a choice that holds for all gates
    "leap projected 2:4+head": SCORED | {"control", "threshold_learning_rate"},
    "leap paper element": SCORED | {"temperature", "threshold_learning_rate", "lambda_max"},
    "leap paper row": SCORED | {"temperature", "threshold_learning_rate", "lambda_max"},
    "movement projected element": SCORED,
    "movement projected 2:4": SCORED,
    "magnitude projected element": ALWAYS - {"score_init"},
    "magnitude projected head": ALWAYS - {"score_init"},
    "one_shot": {"include", "exclude", "target", "calibration_batches"},
}


@pytest.mark.parametrize("case", READ)
@pytest.mark.parametrize("key", OTHER)
def test_a_setting_without_effect_is_refused_by_name(case: str, key: str) -> None:
    if case == "one_shot":
        control, section = "projected", {"target": 0.5, "mode": "one_shot"} | {key: OTHER[key]}
    else:
        rule, control, gates = case.split()
        section = {"target": 0.5, "rule": rule, "control": control, "gates": gates.split("+")} | {key: OTHER[key]}
    if key == "score_init" and case == "one_shot":
        with pytest.raises(UserError, match=r'leap\.score_init: got "zero", by which no weight is better'):
            parse_leap(section)
    elif key in READ[case] or (key == "control" and control == OTHER["control"]):
        parse_leap(section)
    else:
        with pytest.raises(UserError, match=rf"leap\.{key}: got .*, which has no effect here: .*; remove it"):
            parse_leap(section)


@pytest.mark.parametrize(
    ("section", "refused"),
    [
        ({"mode": "one_shot", "rule": "movement"}, 'leap.rule: got "movement", which has no effect here: mode'),
        ({"calibration_batches": 4}, "the dense phase shows the inputs"),
        ({"calibration_batches": 4, "dense_fraction": 0}, None),
        ({"calibration_batches": 4, "dense_fraction": 0, "score_init": "magnitude"}, "looks at no inputs"),
        ({"calibration_batches": 4, "mode": "one_shot", "score_init": "magnitude"}, "looks at no inputs"),
        ({"lambda_min": 200}, 'control "projected" has no regulariser'),
        ({"lambda_min": 200, "control": "paper"}, 'lambda_max is "auto"'),
        ({"lambda_min": 200, "control": "paper", "lambda_max": 160}, "at most lambda_max, which is 160"),
        ({"control": "paper", "lambda_max": 5}, "leap.lambda_max: got 5; allowed: at least lambda_min, which is 10"),
        ({"rule": "gumbel", "control": "paper", "lambda_max": 5}, "leap.lambda_max: got 5, which has no effect here"),
        ({"lambda_min": 200, "control": "paper", "lambda_max": 300}, None),
        ({"temperature": 16, "threshold_learning_rate": 0.5}, None),
        ({"score_moments": "shared", "gates": ["row"]}, "there is no gate of single weights"),
        ({"score_moments": "shared", "gates": ["row", "2:4"]}, None),
        ({"score_moments": "shared", "weights": "frozen"}, "frozen weights have no moments"),
        ({"score_moments": "shared", "mode": "one_shot"}, "takes no step"),
        ({"score_moments": "own", "gates": ["row"]}, None),
        ({"score_moments": "own", "rule": "gumbel"}, None),
        ({"score_moments": "shared", "rule": "gumbel"}, 'under rule "gumbel" scores do not follow'),
        ({"score_init": "gradient", "mode": "one_shot"}, 'leap.score_init: got "gradient", but one shot takes no step'),
        (
            {"score_init": "gradient", "weights": "frozen"},
            'got "gradient", but frozen weights have no moments; allowed',
        ),
        ({"score_init": "gradient", "rule": "gumbel"}, 'got "gradient", but frozen weights have no moments; allowed'),
        ({"score_init": "gradient", "rule": "gumbel", "weights": "trained"}, None),
        (
            {"start": "masks", "permute": "greedy"},
            'leap.permute: got "greedy", which has no effect here: the masks of leap.start are fixed',
        ),
        (
            {"target": 1, "rule": "gumbel"},
            'leap.target: got 1, but rule "gumbel" learns masks, and soft masks of density',
        ),
        ({"target": 1.0, "rule": "leap"}, None),
        ({"score_init": "gradient", "rule": "movement"}, None),
    ],
)
def test_settings_count_together(section: dict[str, Any], refused: str | None) -> None:
    if refused is None:
        parse_leap({"target": 0.5, **section})
    else:
        with pytest.raises(UserError, match=re.escape(refused)):
            parse_leap({"target": 0.5, **section})


# What is too large


def refused_quickly(tmp_path: Path, text: str, *overrides: str) -> str:
    """What is said of a job file; it takes less than three seconds, on a busy machine too."""
    file = tmp_path / "job.json"
    file.write_text(text)
    began = time.process_time()
    with pytest.raises(UserError) as caught:
        load_job(file, overrides)
    assert time.process_time() - began < 3.0 and len(str(caught.value)) < 20_000
    return str(caught.value)


def test_forty_thousand_keys(tmp_path: Path) -> None:
    keys = {f"key{number}": 1 for number in range(40_000)}
    assert "more than 50 problems; the first are" in refused_quickly(tmp_path, json.dumps(keys))
    assert "more than 50 problems" in refused_quickly(tmp_path, json.dumps({"train": keys, "leap": {"target": 0.5}}))
    gates = [{"granularity": "row", "colour": number} for number in range(10_000)]
    assert "more than 50 problems" in refused_quickly(tmp_path, json.dumps({"leap": {"target": 0.5, "gates": gates}}))
    twice = ",".join(f'"k{number}": 1' for number in [*range(20_000), *range(20_000)])
    assert "the same key is given twice: k0, k1, " in refused_quickly(tmp_path, f"{{{twice}}}")


def test_deep_keys_and_values(tmp_path: Path) -> None:
    assert 'override: got "a.a.a.' in refused_quickly(tmp_path, "{}", ".".join("a" * 50_000) + "=1")
    assert "nested too deeply" in refused_quickly(tmp_path, "{}", "leap.gates=" + "[" * 900 + "]" * 900)
    assert "nested too deeply" in refused_quickly(tmp_path, '{"a":' * 900 + "1" + "}" * 900)


def test_a_key_that_is_given_twice_on_the_command_line(tmp_path: Path) -> None:
    said = refused_quickly(tmp_path, "{}", "leap.target=0.1", "leap.target=0.2")
    assert "override: leap.target is given 2 times; keep one" in said
    assert "the same key is given twice: target; keep one" in refused_quickly(
        tmp_path, "{}", 'leap={"target": 1, "target": 2}'
    )


def test_a_job_file_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "job.json").touch()
    os.truncate(tmp_path / "job.json", 5 * 2**30)  # a file with a hole
    with pytest.raises(UserError, match=r"job.json: has 5368709120 bytes; allowed: at most"):
        load_job(tmp_path / "job.json")


def test_what_makes_the_masks_has_a_name() -> None:
    leap: dict[str, dict[str, Any]] = {
        "leap": {"target": 0.5},
        "movement": {"target": 0.5, "rule": "movement"},
        "one_shot": {"target": 0.5, "mode": "one_shot"},
        "fixed": {"start": "zeros"},
    }
    assert all(parse_leap(section).masks_by == name for name, section in leap.items())
