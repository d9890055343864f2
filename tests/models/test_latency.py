"""leap.measure "latency": a table of this machine, and a target that is a share of the sum that fits it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from leap_dist.bench import latency as bench
from leap_dist.bench.forecast import empty_model
from leap_dist.config.job_file import parse_job
from leap_dist.config.leap import LeapConfig
from leap_dist.core.measure import amounts
from leap_dist.errors import UserError
from leap_dist.models.latency import Row, Table, digest_of, fit, here, latency_measure, write_table
from leap_dist.models.plan import make_plan
from tests.models.tiny import tiny
from tests.ranks import RankPools
from tests.zero.test_structured import prune

HEAD, NEURON, FIXED = 3.0, 0.25, 10.0
KINDS = ["head of 4", "neuron of 24"]


def table_of(path: Path, **changes: Any) -> dict[str, Any]:
    """A table of a tiny model by known numbers, and the section of a job that names it."""
    model = tiny("gpt2", "AutoModelForCausalLM")
    units = {"head of 4": 8, "neuron of 24": 48}
    settings: dict[str, Any] = {
        "machine": here(),
        "model": digest_of(model, None),
        "batch": 1,
        "length": 32,
        "threads": 1,
    }
    settings |= {
        "units": units,
        "rows": [],
        "fixed": FIXED,
        "each": {KINDS[0]: HEAD, KINDS[1]: NEURON},
        "residual": 0.0,
    }
    write_table(Table(**settings | changes), path)
    return {
        "target": 0.5,
        "measure": "latency",
        "latency_table": str(path),
        "latency_length": 32,
        "gates": ["head", "neuron"],
    }


def test_the_sum_of_a_table_is_what_is_held(ranks: RankPools, tmp_path: Path) -> None:
    leap = table_of(tmp_path / "table.json")
    model = tiny("gpt2", "AutoModelForCausalLM")
    config = LeapConfig.model_validate({**leap, "gates": ("head", "neuron"), "total_steps": 10})
    plan = make_plan(model, config)
    measure = latency_measure(model, plan, config, None)
    whole = measure.fixed + measure.removable(plan)
    dense = FIXED + 8 * HEAD + 48 * NEURON
    assert {gate.granularity: measure.unit(plan, i) / whole for i, gate in enumerate(plan.gates)} == pytest.approx(
        {"head": HEAD / dense, "neuron": NEURON / dense}
    )
    assert measure.fixed / whole == pytest.approx(FIXED / dense)
    (found,) = ranks(1).run(prune, "gpt2", tmp_path / "hf", 1, leap, {})
    kept, total = amounts(found, found["measure"])
    left = {
        kind: sum(gate["kept_units"] for gate in found["gates"] if gate["granularity"] == kind)
        for kind in ("head", "neuron")
    }
    ms = FIXED + HEAD * left["head"] + NEURON * left["neuron"]
    assert found["measure"]["name"] == "latency" and kept / total == pytest.approx(ms / dense)
    assert abs(ms - 0.5 * dense) <= NEURON + 1e-6 and left["head"] < 8


JOB = {
    "train_micro_batch_size_per_gpu": 4,
    "model": {"from_config": {"model_type": "bert", "vocab_size": 21, "hidden_size": 128, "num_hidden_layers": 1}},
    "data": {"task": "builtin/clock"},
    "train": {"max_steps": 20},
}
JOB["model"]["from_config"] |= {"num_attention_heads": 8, "intermediate_size": 1024, "max_position_embeddings": 256}  # type: ignore[index]


def test_a_table_is_measured_and_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BUDGET", 1.0)
    path = tmp_path / "tables" / "table.json"
    leap = {"target": 0.5, "measure": "latency", "latency_table": str(path), "latency_length": 256}
    config = parse_job({**JOB, "leap": {**leap, "gates": ["head", "neuron"]}}, "a test")
    found = bench.bench_latency(config, 1)
    assert len(found["counts"]) == 10 and found["counts"][0]["off"] == pytest.approx(0)
    assert f"{path}: " in found["notes"][0] and "us a head of 8" in found["notes"][0]
    table = Table.model_validate_json(path.read_text("utf-8"))
    assert table.units == {"head of 8": 8, "neuron of 1024": 1024} and table.machine == here()
    assert table.rows[-1].units == {"head of 8": 2, "neuron of 1024": 256} and table.rows[-1].ms < table.rows[0].ms
    with pytest.raises(UserError, match=r"^leap.latency_length: got 512; allowed: at most 256$"):
        bench.bench_latency(parse_job({**JOB, "leap": {**leap, "latency_length": 512}}, "a test"), 1)
    with pytest.raises(UserError, match=r'^leap.measure: got "weights"; allowed: "latency", with latency_table$'):
        bench.bench_latency(parse_job({**JOB, "leap": {"target": 0.5}}, "a test"), 1)


LLAMA = {"model_type": "llama", "vocab_size": 21, "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 1, "intermediate_size": 1024, "max_position_embeddings": 256}


def test_the_only_head_of_a_block_is_a_part_of_what_is_fixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BUDGET", 1.0)
    path = tmp_path / "table.json"
    leap = {"target": 0.5, "measure": "latency", "latency_table": str(path), "latency_length": 256}
    leap["gates"] = ["head", "neuron"]
    config = parse_job({**JOB, "model": {"from_config": LLAMA}, "leap": leap}, "a test")
    assert len(bench.bench_latency(config, 1)["counts"]) == 4
    table = Table.model_validate_json(path.read_text("utf-8"))
    assert table.units == {"neuron of 1024": 1024} and table.rows[-1].units == {"neuron of 1024": 256}
    model = empty_model(config.model, config.data.task)
    plan = make_plan(model, config.leap)
    measure = latency_measure(model, plan, config.leap, None)
    units = {gate.num_units: measure.unit(plan, number) for number, gate in enumerate(plan.gates)}
    assert units[1] == 0.0 and units[1024] > 0.0
    dense = measure.fixed + measure.removable(plan)
    assert units[1024] / dense == pytest.approx(table.each["neuron of 1024"] / table.rows[0].ms, rel=1e-3)
    heads = config.leap.model_copy(update={"gates": config.leap.gates[:1]})
    with pytest.raises(UserError, match=r"^leap\.gates: no gate has more than one unit, and the last one stays"):
        latency_measure(model, make_plan(model, heads), heads, None)


def test_a_model_of_single_heads_alone_has_no_table(tmp_path: Path) -> None:
    leap = {"target": 0.5, "measure": "latency", "latency_table": str(tmp_path / "table.json"), "gates": ["head"]}
    single = LLAMA | {"intermediate_size": 1}
    with pytest.raises(UserError, match='got "latency"; the model has no blocks of two or more heads or neurons'):
        bench.bench_latency(parse_job({**JOB, "model": {"from_config": single}, "leap": leap}, "a test"), 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file/table.json", "got .*/file/table.json; .*/file is not a folder that can be written to; name a file in a"),
        ("folder", "got .*/folder; it is a folder; name a file in a folder that can be"),
    ],
)
def test_a_table_that_cannot_be_written_is_not_measured(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "medians", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    leap = {"target": 0.5, "measure": "latency", "latency_table": str(tmp_path / name), "gates": ["head", "neuron"]}
    with pytest.raises(UserError, match=f"^leap.latency_table: {message}"):
        bench.bench_latency(parse_job({**JOB, "leap": leap}, "a test"), 1)


def test_the_fit_of_a_sum() -> None:
    counts = [(8, 48), (4, 48), (8, 24), (4, 24), (2, 12)]
    rows = [
        Row(units=dict(zip(KINDS, both, strict=True)), ms=FIXED + HEAD * both[0] + NEURON * both[1]) for both in counts
    ]
    fixed, each, residual = fit(rows, KINDS)
    assert (fixed, *each.values(), residual) == pytest.approx((FIXED, HEAD, NEURON, 0.0))
    slower = [Row(units=row.units, ms=20.0 - row.units[KINDS[0]]) for row in rows]
    with pytest.raises(
        UserError, match=r"^leap.latency_table: with fewer units .* the model is not faster on this machine"
    ):
        fit(slower, KINDS)


@pytest.mark.parametrize(
    ("changes", "leap", "message"),
    [
        ({"machine": here() | {"processor": "another"}}, {}, "another value of the machine: it has another, "),
        ({"model": "0" * 64}, {}, "another value of the model: it has 000000000000, here it is "),
        (
            {"batch": 8},
            {},
            "another value of latency_batch: it has 8, here it is 1; make it with python launch/bench.py",
        ),
        ({}, {"latency_length": 16}, "another value of latency_length: it has 32, here it is 16"),
        ({"each": {KINDS[0]: HEAD}}, {}, "has no transformer.h.0.mlp"),
        ({}, {"latency_table": "gone.json"}, "leap.latency_table: got gone.json; there is no such file; make it with "),
        ({}, {"gates": ["element"]}, 'leap.measure: got "latency", with gate element; allowed: head and neuron, or'),
        ({}, {"gates": ["head", "depth"]}, 'leap.measure: got "latency", with gate depth; allowed: head and neuron'),
        ({}, {"latency_table": None}, r'leap.latency_table: missing; measure "latency" needs one: launch/bench.py'),
        ({}, {"measure": "flops"}, 'leap.latency_table: got "'),
    ],
)
def test_another_table_is_refused(tmp_path: Path, changes: dict[str, Any], leap: dict[str, Any], message: str) -> None:
    import leap_dist

    section = table_of(tmp_path / "table.json", **changes) | leap
    config = {"train_micro_batch_size_per_gpu": 1, "leap": {"total_steps": 10, **section}}
    with pytest.raises(UserError) as caught:
        leap_dist.initialize(model=tiny("gpt2", "AutoModelForCausalLM"), config=config)
    assert message in str(caught.value)


def test_a_damaged_table(tmp_path: Path) -> None:
    leap = table_of(tmp_path / "table.json")
    path = tmp_path / "table.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"fixed": "much"}), "utf-8")
    model = tiny("gpt2", "AutoModelForCausalLM")
    config = LeapConfig.model_validate({**leap, "gates": ("head", "neuron"), "total_steps": 10})
    with pytest.raises(UserError, match=r"table.json: damaged: fixed: .*; make it with python launch/bench.py latency"):
        latency_measure(model, make_plan(model, config), config, None)
