"""Every granularity on every architecture: random units masked as gates mask them, then removed; the same logits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from leap_dist.config.job_file import parse_leap
from leap_dist.core.gates import GatePlan
from leap_dist.core.oracle import unit_index
from leap_dist.errors import UserError
from leap_dist.models.families import FAMILIES
from leap_dist.models.kept import compute_among_kept
from leap_dist.models.outputs import example_inputs, logit_difference
from leap_dist.models.plan import make_plan
from leap_dist.models.shrink import shrink_
from tests.models.tiny import DEEPER, EAGER_ONLY, tiny

pytestmark = pytest.mark.slow

GRANULARITIES = ("element", "row", "column", "block:4x4", "2:4", "head", "neuron", "expert", "layer", "depth")
NONE = {
    **{(kind, "expert"): "has none" for kind in FAMILIES if kind not in ("mixtral", "qwen3_moe")},
    ("mixtral", "neuron"): "has none",  # its neurons are inside experts
    ("albert", "layer"): "has none",  # all its layers are one
    ("albert", "depth"): "has none",
    ("gpt2", "2:4"): "stored as",  # transposed: its rows do not run along the inputs
}
"""Pairs that make no sense, and what is said about them."""


def mask_(model: nn.Module, plan: GatePlan, share: float) -> int:
    """Zero what random masks of all gates drop; `share` of the units stays, at least one a gate. Weights dropped."""
    generator, dropped = torch.Generator().manual_seed(0), 0
    masks = []
    for gate in plan.gates:
        keep = torch.rand(gate.num_units, generator=generator) < share
        keep[torch.randint(gate.num_units, (1,), generator=generator)] = True
        masks.append(keep)
    for tensor, covers in plan.covers.items():
        parameter = model.get_parameter(tensor)
        for cover in covers:
            mask = masks[cover.gate][unit_index(cover.slices)].view(parameter.shape)
            dropped += int((~mask).sum()) if plan.counted(tensor) else 0
            parameter.data *= mask
    return dropped


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", FAMILIES)
def test_masked_and_shrunk_give_the_same_logits(kind: str, granularity: str) -> None:
    changes = DEEPER[kind] if granularity == "depth" else {}
    model = tiny(kind, attention="eager" if kind in EAGER_ONLY else "sdpa", **changes)
    config = parse_leap({"target": 0.5, "gates": [granularity]})
    if (kind, granularity) in NONE:
        with pytest.raises(UserError, match=NONE[kind, granularity]):
            make_plan(model, config)
        return
    plan = make_plan(model, config)
    dropped = mask_(model, plan, share=0.4)
    assert 0 < dropped < plan.prunable
    shrunk = copy.deepcopy(model)
    compute_among_kept(model, [granularity])
    kept = shrink_(shrunk)
    inputs = example_inputs(model)
    assert logit_difference(model, shrunk, inputs) <= 1e-5
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, shrunk))
    if granularity in ("head", "neuron", "expert", "layer", "depth"):
        assert before - after >= dropped  # and the biases of what left
        assert any(kept.values())
