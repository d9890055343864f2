"""The budget of a job against what real engines hold and hand to collectives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from leap_dist.bench.budget import (
    Hosting,
    Memory,
    engine_traffic,
    group_sizes,
    leap_traffic,
    memory,
    state_bytes,
    total,
)
from leap_dist.bench.forecast import empty_model, empty_task
from leap_dist.bench.overhead import engine_step
from leap_dist.bench.scale import held_state, sent_by
from leap_dist.config.job_file import parse_leap
from leap_dist.config.sections import ModelConfig
from leap_dist.models.load import load_model
from leap_dist.models.plan import make_plan
from tests.ranks import RankPools

MODEL = ModelConfig(
    from_config={
        "model_type": "bert",
        "vocab_size": 101,
        "hidden_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 52,
        "max_position_embeddings": 40,
    }
)
GATES: dict[str, list[Any]] = {
    "element": ["element"],
    "head+neuron": ["head", "neuron"],
    "hybrid": ["element", "row"],
    "2:4": ["2:4"],
}
BATCH = 4
SKIPPED, STEPS = 20, 8  # brackets need some steps to follow their cuts
EMBEDDINGS = "bert.embeddings.word_embeddings.weight"


def config_of(stage: int, gates: str, **more: Any) -> dict[str, Any]:
    leap = {"target": 0.5, "gates": GATES[gates], "total_steps": 1000, "dense_fraction": 0.0}
    zero = {"stage": stage, "stage3_param_persistence_threshold": 100}
    return {"train_micro_batch_size_per_gpu": BATCH, "zero_optimization": zero, "leap": leap, "train": {}, **more}


def hold(stage: int, gates: str, frozen: bool = False, folder: str | None = None, **more: Any) -> dict[str, Any]:
    """What a rank of a real engine holds after its first steps, and the least that a step hands to collectives.

    folder: where a checkpoint is written to see what is copied for it.
    """
    import leap_dist

    model = load_model(MODEL, empty_task("builtin/clock")).eval()
    model.get_parameter(EMBEDDINGS).requires_grad_(not frozen)
    engine, *_ = leap_dist.initialize(model=model, config=config_of(stage, gates, **more))
    batch = {"input_ids": torch.randint(3, 101, (BATCH, 9)), "labels": torch.zeros(BATCH, dtype=torch.long)}
    seen = []
    for _ in range(SKIPPED + STEPS):
        engine_step(engine, batch)
        seen.append(sent_by(engine))
    held = {"weights": sum(map(_held, engine.module.parameters())), "state": held_state(engine)}
    held["extra"] = int(engine.leap.measures()["leap_extra_bytes"])
    if folder is not None:
        checkpoints = leap_dist.Checkpoints(folder)
        checkpoints.save(engine, {})
        checkpoints.wait()
        copies = {name: copy for name, copy in checkpoints._host.items() if not name.startswith("random/")}
        held["copy"] = sum(copy.nbytes for copy in copies.values())
    engine.destroy()
    return held | {"sent": min(seen[SKIPPED:])}


def _held(parameter: Any) -> int:
    """Bytes of a parameter on this rank: under stage 3 its part, and the whole where that persists."""
    if not hasattr(parameter, "ds_tensor"):
        return int(parameter.nbytes)
    return int(parameter.ds_tensor.nbytes + (parameter.nbytes if parameter.ds_persist else 0))


def modelled(stage: int, gates: str, ranks: int, frozen: bool = False, **more: Any) -> dict[str, Any]:
    """The same by arithmetic, on the meta device."""
    model, config = empty_model(MODEL, "builtin/clock"), config_of(stage, gates, **more)
    model.get_parameter(EMBEDDINGS).requires_grad_(not frozen)
    leap = parse_leap(config["leap"])
    plan, hosting = make_plan(model, leap), Hosting.of(config, ranks)
    cut = "n:m groups cut by ranks"  # at most so much: no shard of these models ends within a group
    sent = total([traffic for traffic in leap_traffic(plan, leap, hosting) if traffic.purpose != cut], "")
    held = memory(model, plan, hosting, leap)
    expected = {"weights": held.weights, "state": held.state + held.extra, "extra": held.extra, "copy": held.copy}
    return expected | {"sent": (sent.collectives, sent.bytes)}


# Every kind under every stage, on one rank and on two in turn
@pytest.mark.parametrize(
    ("gates", "stage", "world"),
    [
        (gates, stage, 1 + (stage + turn) % 2)
        for turn, gates in enumerate(("element", "head+neuron"))
        for stage in range(4)
    ],
)
def test_real_engines_hold_and_send_what_was_forecast(
    ranks: RankPools, tmp_path: Path, gates: str, stage: int, world: int
) -> None:
    expected = modelled(stage, gates, world)
    all_found = ranks(world).run(hold, stage, gates, False, str(tmp_path))
    assert all_found[0]["copy"] == pytest.approx(expected["copy"], rel=0.01)  # under stage 0 the first rank's alone
    for found in all_found:
        for key in ("state", "extra", "weights"):
            assert found[key] == pytest.approx(expected[key], rel=0.01)
        assert found["sent"] == expected["sent"]


def held_before_a_step(gates: str, **leap: Any) -> list[tuple[int, int]]:
    """(state, LEAP's own part of it) of this rank under every stage, of engines that learn no masks."""
    import leap_dist
    from leap_dist.zero.binding import flat_partitions

    found = []
    for stage in (0, 1, 2, 3):
        model = load_model(MODEL, empty_task("builtin/clock")).eval()
        if "start" in leap:
            for name, weight in model.named_parameters():
                weight.data.mul_(torch.rand_like(weight) < 0.5 if "attention" in name else 1.0)
        config = config_of(stage, gates) | {"leap": {**leap, **({} if "start" in leap else {"gates": GATES[gates]})}}
        engine, *_ = leap_dist.initialize(model=model, config=config)
        tensors = [t for state in engine.leap.state.values() for t in state.values()]
        values = engine.leap.gating.values
        tensors += [*flat_partitions(engine), values.flat, *values.state.values()]
        held = {tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.numel()}  # a buffer once
        hosted = {p.data_ptr() for p in engine.module.parameters()}  # under stage 0 these are the masters
        state = sum(size for place, size in held.items() if stage > 0 or place not in hosted)
        found.append((state, engine.leap.gating.extra_bytes))
        engine.destroy()
    return found


def held_by_one_shot(gates: str) -> list[tuple[int, int]]:
    return held_before_a_step(gates, target=0.5, mode="one_shot", score_init="magnitude")


def held_by_fixed_masks(gates: str) -> list[tuple[int, int]]:
    return held_before_a_step(gates, start="zeros", total_steps=10)


def held_by_moments_of_their_own(gates: str) -> list[tuple[int, int]]:
    return held_before_a_step(gates, target=0.5, score_moments="own", total_steps=10)


def held_by_frozen_weights(gates: str) -> list[tuple[int, int]]:
    return held_before_a_step(gates, target=0.5, weights="frozen", total_steps=10)


@pytest.mark.parametrize("gates", ["element", "head+neuron"])
def test_engines_with_frozen_weights_hold_what_was_forecast(ranks: RankPools, gates: str) -> None:
    model = empty_model(MODEL, "builtin/clock")
    leap = parse_leap({"target": 0.5, "gates": GATES[gates], "weights": "frozen"})
    plan = make_plan(model, leap)
    for stage, (state, extra) in enumerate(ranks(2).run(held_by_frozen_weights, gates)[0]):
        held = memory(model, plan, Hosting.of(config_of(stage, gates), 2), leap)
        assert state == pytest.approx(held.state + held.extra, rel=0.01)
        assert extra == pytest.approx(held.extra, rel=0.01)


def test_engines_with_moments_of_their_own_hold_what_was_forecast(ranks: RankPools) -> None:
    model = empty_model(MODEL, "builtin/clock")
    leap = parse_leap({"target": 0.5, "score_moments": "own"})
    plan = make_plan(model, leap)
    shared, magnitude = (parse_leap({"target": 0.5, "rule": rule}) for rule in ("leap", "magnitude"))
    assert [state_bytes(plan, each) for each in (leap, shared, magnitude)] == [17, 9, 9]
    for stage, (state, extra) in enumerate(ranks(2).run(held_by_moments_of_their_own, "element")[0]):
        held = memory(model, plan, Hosting.of(config_of(stage, "element"), 2), leap)
        assert state == pytest.approx(held.state + held.extra, rel=0.01)
        assert extra == pytest.approx(held.extra, rel=0.01)


@pytest.mark.parametrize("gates", ["element", "head+neuron", "fixed"])
def test_engines_that_learn_no_masks_hold_what_was_forecast(ranks: RankPools, gates: str) -> None:
    fixed = gates == "fixed"
    gates = "element" if fixed else gates
    model = empty_model(MODEL, "builtin/clock")
    plan = make_plan(model, parse_leap({"target": 0.5, "gates": GATES[gates]}))
    leap = parse_leap({"start": "zeros"} if fixed else {"target": 0.5, "mode": "one_shot", "gates": GATES[gates]})
    for found in ranks(2).run(held_by_fixed_masks if fixed else held_by_one_shot, gates):
        for stage, (state, extra) in enumerate(found):
            held = memory(model, plan, Hosting.of(config_of(stage, gates), 2), leap)
            assert state == pytest.approx(held.state + held.extra, rel=0.01)
            assert extra == pytest.approx(held.extra, rel=0.01)
            assert fixed or held.gradients == 0


@pytest.mark.parametrize(
    ("stage", "gates", "more"),
    [
        (2, "element", {"bf16": {"enabled": True}}),
        (3, "element", {"bf16": {"enabled": True}}),
        (2, "hybrid", {}),
        (3, "2:4", {}),
        (2, "element", {"frozen": True}),
        (3, "head+neuron", {"frozen": True}),
    ],
)
def test_odd_jobs_too(ranks: RankPools, stage: int, gates: str, more: dict[str, Any]) -> None:
    expected = modelled(stage, gates, 2, **more)
    for found in ranks(2).run(_hold_with, stage, gates, more):
        for key in ("state", "extra", "weights"):
            assert found[key] == pytest.approx(expected[key], rel=0.01)
        assert found["sent"] == expected["sent"]


def _hold_with(stage: int, gates: str, more: dict[str, Any]) -> dict[str, Any]:
    return hold(stage, gates, **more)


def test_hosting_reads_deepspeeds_keys() -> None:
    zero = {"stage": 3, "reduce_bucket_size": 1e6, "offload_optimizer": {"device": "cpu"}, "offload_param": None}
    deepspeed = {"train_micro_batch_size_per_gpu": 2, "train_batch_size": 24, "fp16": {"enabled": True}}
    hosting = Hosting.of({**deepspeed, "zero_optimization": zero}, ranks=4)
    assert (hosting.stage, hosting.width, hosting.accumulation, hosting.reduce_bucket) == (3, 2, 3, 10**6)
    assert hosting.offloads == {"state"}
    assert Hosting.of({"train_micro_batch_size_per_gpu": 2}, ranks=4) == Hosting(stage=0, ranks=4)


def test_shards_are_padded_as_deepspeed_pads() -> None:
    assert Hosting(stage=0, ranks=3).shard([7, 1]) == 8
    assert Hosting(stage=2, ranks=3).shard([7, 1]) == 4  # 8 -> 12, a multiple of 2 x 3
    assert Hosting(stage=3, ranks=3).shard([7, 1]) == 3 + 1


def test_what_is_offloaded_is_not_on_the_device() -> None:
    held = Memory(weights=8, gradients=4, state=2, extra=1)
    assert held.total == 15
    assert held.on_device(frozenset()) == 15
    assert held.on_device(frozenset({"state"})) == 12
    assert held.on_device(frozenset({"weights"})) == 7
    assert held.on_device(frozenset({"weights", "state"})) == 4


def test_dense_jobs_have_no_gates() -> None:
    model = empty_model(MODEL, "builtin/clock")
    leap = parse_leap({"target": 0.5, "gates": ["head", "neuron"]})
    plan = make_plan(model, leap)
    groups = group_sizes(model, plan)
    assert sum(map(sum, groups)) == sum(p.numel() for p in model.parameters())
    assert sum(map(sum, group_sizes(model, None))) == sum(p.numel() for p in model.parameters())
    assert memory(model, None, Hosting(2, 2), leap).extra == 0


def test_deepspeeds_traffic_by_stage() -> None:
    model = empty_model(MODEL, "builtin/clock")
    size = sum(p.numel() for p in model.parameters()) * 2
    sent = {
        stage: {t.purpose: t.bytes for t in engine_traffic(model, Hosting(stage, 2, 2, 3, persistent=0))}
        for stage in range(4)
    }
    assert sent[0] == {"gradients reduced": size}
    assert sent[1] == {"gradients reduced": size, "weights gathered": size}
    assert sent[2] == {"gradients reduced": 3 * size, "weights gathered": size}
    assert sent[3] == {"gradients reduced": 3 * size, "weights gathered": 6 * size}
    assert engine_traffic(model, Hosting(2, 1)) == []


def test_leaps_traffic_does_not_grow_with_ranks_or_weights() -> None:
    model = empty_model(MODEL, "builtin/clock")
    leap = parse_leap({"target": 0.5})
    plan = make_plan(model, leap)
    sent = [leap_traffic(plan, leap, Hosting(2, ranks)) for ranks in (2, 1024)]
    assert sent[0] == sent[1]
    assert leap_traffic(plan, leap, Hosting(2, 1)) == leap_traffic(plan, leap, Hosting(0, 2)) == []
    for still in ({"start": "zeros"}, {"mode": "one_shot"}):  # nothing is learned
        assert leap_traffic(plan, leap.model_copy(update=still), Hosting(2, 2)) == []
    paper = leap.model_copy(update={"control": "paper"})
    more = total(leap_traffic(plan, paper, Hosting(2, 2)), "").collectives
    assert more == total(sent[0], "").collectives + 1
