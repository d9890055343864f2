"""Every granularity on every architecture: random units masked as gates mask them, then removed; the same logits."""

from __future__ import annotations

import copy

import pytest

from leap_dist.config.job_file import parse_leap
from leap_dist.errors import UserError
from leap_dist.models.families import FAMILIES
from leap_dist.models.kept import compute_among_kept
from leap_dist.models.outputs import example_inputs, logit_difference
from leap_dist.models.plan import make_plan
from leap_dist.models.shrink import shrink_
from tests.models.masking import mask_
from tests.models.tiny import DEEPER, EAGER_ONLY, HEADS, tiny

pytestmark = pytest.mark.slow

GRANULARITIES = (
    *("element", "row", "column", "block:4x4", "2:4"),
    *("head", "neuron", "expert", "layer", "depth", "hidden", "hidden+head+neuron"),
)
NONE = {
    **{(kind, "expert"): "has none" for kind in FAMILIES if kind not in ("mixtral", "qwen3_moe")},
    ("mixtral", "neuron"): "has none",  # its neurons are inside experts
    ("mixtral", "hidden+head+neuron"): "has none",
    ("albert", "layer"): "has none that can leave, as its layers share their weights",
    ("albert", "depth"): "has none that can leave, as its layers share their weights",
    ("gpt2", "2:4"): "stored as",  # transposed: its rows do not run along the inputs
}
"""Pairs that make no sense, and what is said about them."""


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", FAMILIES)
def test_masked_and_shrunk_give_the_same_logits(kind: str, granularity: str) -> None:
    changes = DEEPER[kind] if granularity == "depth" else {}
    head = HEADS[kind] if "hidden" in granularity else "AutoModel"
    model = tiny(kind, head, attention="eager" if kind in EAGER_ONLY else "sdpa", **changes)
    wide = {"granularity": "hidden", "multiple_of": 8} if kind in ("mixtral", "qwen3_moe") else "hidden"
    gates = [wide if gate == "hidden" else gate for gate in granularity.split("+")]
    config = parse_leap({"target": 0.5, "gates": gates})
    if (kind, granularity) in NONE:
        with pytest.raises(UserError, match=NONE[kind, granularity]):
            make_plan(model, config)
        return
    plan = make_plan(model, config)
    dropped = mask_(model, plan, share=0.4)
    assert 0 < dropped < plan.prunable
    shrunk = copy.deepcopy(model)
    compute_among_kept(model, granularity.split("+"), plan.covers)
    kept = shrink_(shrunk)
    inputs = example_inputs(model)
    assert logit_difference(model, shrunk, inputs) <= 1e-5
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, shrunk))
    if granularity not in ("element", "row", "column", "block:4x4", "2:4"):
        assert before - after >= dropped  # and the biases of what left
        assert any(kept.values())
