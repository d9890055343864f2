"""Kept weights by arithmetic against masks of any units, in the architectures whose gates overlap."""

from __future__ import annotations

import random

import pytest
import torch

from leap_dist.config.job_file import parse_leap
from leap_dist.core.closed_form import closed_form
from leap_dist.core.gates import GatePlan, matrix_gate
from leap_dist.models.plan import make_plan
from leap_dist.ops.slices import expand_units
from tests.models.tiny import EAGER_ONLY, HEADS, tiny

COVERED = [
    (kind, gates)
    for kind in ("bert", "deberta-v2", "gpt2", "gemma3_text", "llama", "opt", "phi3", "t5", "vit")
    for gates in (["head", "neuron", "hidden"], ["hidden"], ["head", "neuron"])
]
DEPENDS = [
    ("bert", ["head", "row"]),  # rows of a head may be gone already
    ("bert", ["row", "element"]),
    ("bert", ["block:4x4", "row"]),
    ("llama", ["depth", "hidden", "neuron"]),  # neurons of a layer that is gone
    ("mixtral", ["expert", "row"]),
]


def plan_of(kind: str, gates: list[str]) -> GatePlan:
    model = tiny(kind, HEADS[kind], "eager" if kind in EAGER_ONLY else "sdpa")
    return make_plan(model, parse_leap({"target": 0.5, "total_steps": 10, "gates": gates}))


def masks_of(plan: GatePlan, keep: list[int]) -> dict[str, torch.Tensor]:
    """Masks of all tensors where so many units of every gate stay, whichever these are."""
    units = [torch.randperm(gate.num_units) < kept for gate, kept in zip(plan.gates, keep, strict=True)]
    masks = {}
    for tensor, covers in plan.covers.items():
        masks[tensor] = torch.ones(plan.numel(tensor), dtype=torch.bool)
        for cover in covers:
            one = torch.ones_like(masks[tensor])
            for part in cover.slices:
                expand_units(units[cover.gate], one, 0, part)
            masks[tensor] &= one
    return masks


@pytest.mark.parametrize(("kind", "gates"), COVERED)
def test_arithmetic_counts_what_masks_keep(kind: str, gates: list[str]) -> None:
    plan = plan_of(kind, gates)
    weights, everything = closed_form(plan), closed_form(plan, followers=True)
    assert weights is not None and everything is not None
    random.seed(kind)
    for _ in range(5):
        keep = [random.randint(0, gate.num_units) for gate in plan.gates]
        masks = masks_of(plan, keep)
        assert weights(keep) == sum(int(mask.sum()) for name, mask in masks.items() if plan.counted(name))
        assert everything(keep) == sum(int(mask.sum()) for mask in masks.values())
    assert weights([gate.num_units for gate in plan.gates]) == plan.prunable


@pytest.mark.parametrize(("kind", "gates"), DEPENDS)
def test_where_it_depends_on_the_units_there_is_none(kind: str, gates: list[str]) -> None:
    assert closed_form(plan_of(kind, gates)) is None


def test_edge_blocks_and_rows_with_columns() -> None:
    assert closed_form(GatePlan([matrix_gate("w", (5, 5), "block:2x2")])) is None
    form = closed_form(GatePlan([matrix_gate("w", (5, 7), "row"), matrix_gate("w", (5, 7), "column")]))
    assert form is not None and form([2, 3]) == 6
    form = closed_form(GatePlan([matrix_gate("w", (4, 4), "2:4"), matrix_gate("v", (4, 4), "element")]))
    assert form is not None and form([8, 3]) == 11
