"""The host's own checkpoints: engine.save_checkpoint, then load_checkpoint in a new engine, ends as if undisturbed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from leap_dist.errors import UserError
from tests.ranks import RankPools
from tests.zero.test_engine import pruned_engine, run_steps

STEPS = 20
PHASES = {"before the first step": 0, "dense": 1, "prune": 9, "settle": 17}


def engine_of(kind: str, stage: int, changes: dict[str, Any], **more: Any) -> Any:
    return pruned_engine(kind, stage, 1, {"total_steps": STEPS, "dense_fraction": 0.15, **changes}, **more)


def outcome(engine: Any) -> tuple[str, str, int, float]:
    """What a run ended with; every bit of the latent weights, scores and moments is in the second."""
    import hashlib

    import leap_dist

    certificate = leap_dist.finalize(engine)
    digest = hashlib.sha256()
    state = engine.leap.state
    values = engine.leap.gating.values
    tensors = [t for flat in state for _, t in sorted(state[flat].items()) if torch.is_tensor(t)]
    for tensor in [*tensors, values.flat, *values.state.values()]:
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return certificate["weights_sha256"], digest.hexdigest(), certificate["kept"], engine.leap.param_groups[0]["lr"]


def resumed(folder: str, kind: str, stage: int, changes: dict[str, Any], more: dict[str, Any]) -> dict[str, bool]:
    """For each phase, whether a run that was loaded there, twice, ended like the undisturbed one."""
    dtype = torch.bfloat16 if more else torch.float32
    engine = engine_of(kind, stage, changes, **more)
    engine.save_checkpoint(folder, tag="0")
    for first, last in zip(PHASES.values(), [*list(PHASES.values())[1:], STEPS], strict=True):
        assert engine.leap.num_steps == first
        run_steps(engine, 1, first, last, dtype)
        engine.save_checkpoint(folder, tag=str(last))
    phases = engine.leap.schedule.phase
    assert [phases(step) for step in PHASES.values()] == ["dense", "dense", "prune", "settle"]
    expected = outcome(engine)
    engine.destroy()
    found = {}
    for name, step in PHASES.items():
        engine = engine_of(kind, stage, changes, **more)
        if step:
            engine.load_checkpoint(folder, tag="0")  # and then another one
        path, _ = engine.load_checkpoint(folder, tag=str(step))
        found[name] = path is not None and engine.leap.num_steps == step
        run_steps(engine, 1, step, STEPS, dtype)
        found[name] &= outcome(engine) == expected
        engine.destroy()
    return found


@pytest.mark.parametrize(
    ("kind", "stage", "world", "changes"),
    [
        ("element", 0, 1, {}),
        ("hybrid", 0, 2, {"control": "paper"}),
        ("hybrid", 1, 2, {}),
        ("row", 2, 1, {"control": "paper"}),
        ("head+2:4", 2, 2, {}),
        ("hybrid", 3, 2, {"control": "paper"}),
        ("element", 3, 1, {"rule": "magnitude"}),
        ("hybrid", 0, 2, {"score_init": "activation"}),
        ("element", 3, 2, {"score_init": "gradient"}),
        ("hybrid", 2, 2, {"score_moments": "own"}),
    ],
)
def test_a_loaded_run_ends_bit_for_bit_like_the_undisturbed_one(
    ranks: RankPools, tmp_path: Path, kind: str, stage: int, world: int, changes: dict[str, Any]
) -> None:
    for found in ranks(world).run(resumed, str(tmp_path), kind, stage, changes, {}):
        assert all(found.values()), found


@pytest.mark.parametrize("stage", [2, 3])
def test_so_does_one_in_bf16(ranks: RankPools, tmp_path: Path, stage: int) -> None:
    for found in ranks(2).run(resumed, str(tmp_path), "hybrid", stage, {}, {"bf16": {"enabled": True}}):
        assert all(found.values()), found


def messages(folder: str, stage: int) -> list[str]:
    """What loading says where a checkpoint does not fit; the run it is loaded into is as before."""
    import deepspeed

    saved = engine_of("row", stage, {})
    saved.save_checkpoint(folder, tag="row")
    state = saved.leap.state_dict()
    saved.destroy()
    found = []
    for kind, changes in (("row", {"target": 0.3}), ("row", {"total_steps": 30})):
        engine = engine_of(kind, stage, changes)
        before = copy.deepcopy(engine.leap.gating.values.flat)
        with pytest.raises(UserError) as refusal:
            engine.load_checkpoint(folder, tag="row")
        assert torch.equal(engine.leap.gating.values.flat, before) and engine.leap.num_steps == 0
        found.append(str(refusal.value))
        engine.destroy()
    engine = engine_of("row", stage, {})  # of a model whose gate has a unit less
    other = {**state, "leap": {**state["leap"], "of": {**state["leap"]["of"], "gate row '1.weight:row'": 38}}}
    with pytest.raises(UserError) as refusal:
        engine.leap.load_state_dict(other)
    found.append(str(refusal.value))
    engine.destroy()
    engine = engine_of("element", stage, {})  # whose sharding DeepSpeed itself refuses where it loads
    with pytest.raises(UserError) as refusal:
        engine.leap.load_state_dict(state)
    found.append(str(refusal.value))
    del state["leap"]
    with pytest.raises(UserError) as refusal:
        engine.leap.load_state_dict(state)
    found.append(str(refusal.value))
    engine.destroy()
    deepspeed.comm.barrier()
    return found


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(ranks: RankPools, tmp_path: Path) -> None:
    target, steps, units, gates, foreign = ranks(1).run(messages, str(tmp_path), 2)[0]
    assert target.startswith("leap.target: the checkpoint was written with 0.2, this run has 0.3\n")
    assert steps.startswith("leap.total_steps: the checkpoint was written with 20, this run has 30\n")
    assert units.startswith("gate row '1.weight:row': the checkpoint was written with 38, this run has 37\n")
    assert gates.splitlines()[-1] == "checkpoint: restore the config, or load its weights only"
    assert foreign.startswith("checkpoint: the optimizer that wrote it was not LEAP's; only its weights can be loaded")


def by_torch(folder: str) -> bool:
    """torch's own way at stage 0, in other dtypes: a file read with weights_only, states of fp64, masks of fp32."""
    engine = engine_of("hybrid", 0, {})
    run_steps(engine, 1, 0, 9)
    path = Path(folder) / "state.pt"
    torch.save({"model": engine.module.state_dict(), "optimizer": engine.leap.state_dict()}, path)
    rates = engine.lr_scheduler.state_dict()
    run_steps(engine, 1, 9, STEPS)
    expected = outcome(engine)
    saved = torch.load(path, weights_only=True)
    for state in saved["optimizer"]["state"].values():
        for key, value in state.items():
            if torch.is_tensor(value):
                state[key] = value.float() if value.dtype == torch.bool else value.double()
    engine = engine_of("hybrid", 0, {})
    engine.module.load_state_dict(saved["model"])
    engine.leap.load_state_dict(saved["optimizer"])
    engine.lr_scheduler.load_state_dict(rates)
    run_steps(engine, 1, 9, STEPS)
    return outcome(engine) == expected


def test_torchs_own_save_and_load_do_too(ranks: RankPools, tmp_path: Path) -> None:
    assert ranks(1).run(by_torch, str(tmp_path)) == [True]
