"""One shot: masks are those of pruning by |W| ||x|| in plain torch, bit for bit, on any ranks and stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import leap_dist
from leap_dist.config.job_file import parse_engine
from leap_dist.core.gating import MASK, SCORE
from leap_dist.core.oracle import best_units, unit_index
from leap_dist.errors import UserError
from leap_dist.models.plan import make_plan
from tests.peers.nets import GATES, batches, family, net
from tests.ranks import RankPools

SECTION = {"target": 0.5, "mode": "one_shot", "score_init": "activation", "calibration_batches": 6}


def config_of(kind: str, stage: int, **changes: Any) -> dict[str, Any]:
    section = {**SECTION, **GATES[kind], "target": GATES[kind].get("target", 0.5), **changes}
    return {
        "train_micro_batch_size_per_gpu": 3,
        "zero_optimization": {"stage": stage},
        "leap": section,
        **({"family": family(kind)} if family(kind) else {}),
    }


def micro_batches() -> list[Tensor]:
    return [part for x, _ in batches(1) for part in x.split(3)]


def pruned(kind: str, stage: int, **changes: Any) -> tuple[dict[str, Tensor], dict[str, Any], set[str]]:
    """Masks and certificate of a model that is cut at once, and the keys of its state."""
    from leap_dist.zero.engine import gather_masks

    engine, *_ = leap_dist.initialize(model=net(kind), config=config_of(kind, stage, **changes))
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    still = next(module for module in engine.module.modules() if isinstance(module, nn.Linear)).eval()
    if changes.get("score_init") != "magnitude":
        assert leap_dist.calibrate(engine, micro_batches()[rank::world]) == 6
    assert engine.module.training and not still.training and not engine.leap.level.started
    certificate = leap_dist.finalize(engine)
    masks = dict(gather_masks(engine))
    keys = {key for state in engine.leap.state.values() for key in state} | set(engine.leap.gating.values.state)
    engine.destroy()
    return masks, certificate, keys


def under_every_stage(kind: str, **changes: Any) -> list[tuple[dict[str, Tensor], dict[str, Any], set[str]]]:
    return [pruned(kind, stage, **changes) for stage in (0, 1, 2, 3)]


def reference(kind: str, kept: list[int], activation: bool = True) -> dict[str, Tensor]:
    """|W_ij| ||x_j|| in plain torch: the best of every gate, or of every m neighbours, by the mean over each unit.

    Single weights are compared over the mean of their row; heads and neurons by their outputs' weights alone.
    """
    model, squares = net(kind), {}

    def see(name: str, rows: Tensor) -> None:
        squares[name] = squares.get(name, 0.0) + rows.detach().flatten(0, -2).square().sum(0, dtype=torch.float64)

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda _, given, name=name: see(f"{name}.weight", given[0]))
    for x in micro_batches():
        model(x)
    settings = parse_engine(config_of(kind, 0))
    plan, weights = make_plan(model, settings.leap, settings.family), dict(model.named_parameters())
    masks = {name: torch.ones_like(weights[name], dtype=torch.bool) for name in plan.covers}
    for index, gate in enumerate(plan.gates):
        sums = torch.zeros(gate.num_units, dtype=torch.float64)
        for name, covers in plan.covers.items():
            for cover in covers:
                into = any(part.block_rows < part.bounds[1] for part in cover.slices)
                if activation and into and gate.granularity in ("head", "neuron"):
                    continue  # what goes into a unit
                if cover.gate == index and plan.counted(name):
                    sizes = weights[name].detach().abs()
                    sizes = sizes * squares[name].sqrt().float() if activation else sizes
                    if activation and gate.elementwise and not gate.pattern:
                        sizes = sizes / sizes.mean(1, dtype=torch.float64, keepdim=True).float()
                    sums.index_add_(0, unit_index(cover.slices).flatten(), sizes.double().flatten())
        best = best_units(gate, (sums / gate.unit_sizes).float(), kept[index])
        for name, covers in plan.covers.items():
            for cover in covers:
                if cover.gate == index:
                    masks[name] &= best[unit_index(cover.slices)].view(masks[name].shape)
    return masks


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", ["element", "2:4", "head+neuron", "hybrid"])
def test_masks_are_those_of_plain_torch_on_any_ranks_and_stage(ranks: RankPools, kind: str, world: int) -> None:
    for found in ranks(world).run(under_every_stage, kind):
        for masks, certificate, keys in found:
            expected = reference(kind, [gate["kept_units"] for gate in certificate["gates"]])
            assert masks.keys() == expected.keys()
            assert [name for name in masks if not torch.equal(masks[name], expected[name])] == []
            assert abs(certificate["kept"] - certificate["target"] * certificate["prunable"]) <= certificate["unit"]
            assert keys <= {"latent", MASK, SCORE, "element_mask"}
    if kind == "element":
        assert all(abs(gate["kept_units"] - gate["units"] / 2) <= 1 for gate in found[0][1]["gates"])


def test_by_magnitude_no_batch_is_needed(ranks: RankPools) -> None:
    for masks, certificate, _ in ranks(2).run(by_magnitude)[0]:
        expected = reference("element", [gate["kept_units"] for gate in certificate["gates"]], activation=False)
        assert all(torch.equal(masks[name], expected[name]) for name in expected)


def by_magnitude() -> list[tuple[dict[str, Tensor], dict[str, Any], set[str]]]:
    changes = {"score_init": "magnitude", "calibration_batches": 16}
    return [pruned("element", stage, **changes) for stage in (0, 3)]


def refused(stage: int) -> list[str]:
    """What an engine says that is used in the wrong order, or given nothing to calibrate on."""
    from leap_dist.checkpoint.checkpoints import Checkpoints

    said: list[str] = []

    def trying(action: Any) -> None:
        with pytest.raises(UserError) as refusal:
            action()
        said.append(str(refusal.value))

    engine, *_ = leap_dist.initialize(model=net(), config=config_of("element", stage))
    rank = torch.distributed.get_rank()
    trying(lambda: leap_dist.calibrate(engine, []))
    if stage == 3:
        trying(lambda: leap_dist.calibrate(engine, micro_batches() if rank == 0 else []))
    trying(lambda: leap_dist.finalize(engine))
    trying(lambda: Checkpoints("nowhere").save(engine, {}))
    loss = engine(micro_batches()[0]).sum()
    engine.backward(loss)
    trying(engine.step)
    engine.destroy()
    engine, *_ = leap_dist.initialize(model=net(), config=config_of("element", stage))
    leap_dist.calibrate(engine, micro_batches())
    leap_dist.finalize(engine)
    trying(lambda: leap_dist.calibrate(engine, micro_batches()))
    engine.destroy()
    plain = {"score_init": "magnitude", "calibration_batches": 16}
    engine, *_ = leap_dist.initialize(model=net(), config=config_of("element", stage, **plain))
    trying(lambda: leap_dist.calibrate(engine, micro_batches()))
    engine.destroy()
    trying(lambda: leap_dist.calibrate(net(), micro_batches()))
    return said


def test_what_is_done_in_the_wrong_order_is_refused(ranks: RankPools) -> None:
    for said in ranks(2).run(refused, 3):
        starts = [
            "batches: there is none; allowed: at least one",
            "batches: rank 1 has none; allowed: at least one",
            "leap.score_init: scores start by inputs, but no forward pass in training mode has shown the",
            'engine: leap.mode is "one_shot", which takes no step that could be saved',
            'leap.mode: got "one_shot", which takes no step: call leap_dist.finalize',
            "engine: its scores have their start",
            'leap.score_init: scores start from "magnitude", which looks at no inputs',
            "engine: got a Sequential; allowed: one that leap_dist.initialize or attach made",
        ]
        assert len(said) == len(starts)
        assert [text for text, start in zip(said, starts, strict=True) if not text.startswith(start)] == []
