"""Whole layers leave: what is left computes what the masked model did, and is a stock model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, PreTrainedModel

from leap_dist.config.job_file import parse_leap
from leap_dist.errors import UserError
from leap_dist.models.blocks import find_structures, find_sublayers
from leap_dist.models.families import FAMILIES
from leap_dist.models.kept import compute_among_kept
from leap_dist.models.outputs import example_inputs, logit_difference
from leap_dist.models.plan import make_plan
from leap_dist.models.pruned_folder import load_pruned, save_shrunk
from leap_dist.models.shrink import shrink_
from leap_dist.models.stacks import find_stacks
from tests.models.tiny import DEEPER, EAGER_ONLY, mask_some_, mask_units_, tiny

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
LAYERED = sorted(FAMILIES.keys() - {"albert"})
POST_NORM = ("bert", "deberta", "deberta-v2", "distilbert", "electra", "roberta")
QWEN3_MOE = {"num_hidden_layers": 6, "mlp_only_layers": [1], "decoder_sparse_step": 2}
GEMMA3 = {"num_hidden_layers": 6, "sliding_window": 4, "sliding_window_pattern": 3}


def deep(kind: str, head: str = "AutoModel", **changes: Any) -> PreTrainedModel:
    return tiny(kind, head, "eager" if kind in EAGER_ONLY else "sdpa", **(DEEPER[kind] | changes))


@torch.no_grad()
def drop_layers_(model: PreTrainedModel, layers: list[int]) -> None:
    """Mask whole layers in every list of them, as a gate does."""
    for stack in find_stacks(model):
        for index in layers:
            for tensor in stack.tensors[index]:
                model.get_parameter(tensor).zero_()
    compute_among_kept(model, ["expert"], dict(model.named_parameters()))


def check(model: PreTrainedModel, folder: Path, stock: bool) -> dict[str, Any]:
    """Shrink a copy, save it, and load it both ways; the config that was written."""
    shrunk = copy.deepcopy(model)
    for module in shrunk.modules():
        module._forward_hooks.clear()
    manifest = save_shrunk(shrunk, shrink_(shrunk), folder)
    assert manifest.stock == stock
    attention = model.config._attn_implementation
    inputs = example_inputs(model, 2, 12)
    loaders = [load_pruned, *([AutoModel.from_pretrained] if stock else [])]
    for load in loaders:
        assert logit_difference(model, load(folder, attn_implementation=attention), inputs) <= TOLERANCE
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("kind", LAYERED)
def test_a_model_with_fewer_layers_is_a_stock_model(kind: str, tmp_path: Path) -> None:
    model = deep(kind)
    drop_layers_(model, [1, 2])
    config = check(model, tmp_path / "model", stock=True)
    keys = {"distilbert": ["n_layers"], "gpt2": ["n_layer"], "t5": ["num_layers", "num_decoder_layers"]}
    assert [config[key] for key in keys.get(kind, ["num_hidden_layers"])] == [2] * len(keys.get(kind, [0]))


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("gemma3_text", GEMMA3, {"layer_types": ["full_attention", *["sliding_attention"] * 2, "full_attention"]}),
        ("qwen3_moe", QWEN3_MOE, {"mlp_only_layers": [0, 2], "decoder_sparse_step": 1, "num_hidden_layers": 4}),
    ],
)
def test_lists_with_an_entry_for_each_layer_are_cut_alike(
    kind: str, changes: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    model = deep(kind, **changes)
    drop_layers_(model, [0, 1])
    config = check(model, tmp_path / "model", stock=True)
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize("kind", LAYERED)
def test_layers_whose_halves_are_both_empty_leave_where_no_norm_follows_the_sum(kind: str, tmp_path: Path) -> None:
    model = deep(kind)
    layers = [stack.layers[index] for stack in find_stacks(model) for index in (1, 3)]
    for sublayer in find_sublayers(model):
        if any(sublayer.name.startswith(f"{layer}.") for layer in layers):
            mask_units_(model, sublayer, [0])
    check(model, tmp_path / "model", stock=kind not in POST_NORM)


@pytest.mark.parametrize("kind", ["bert", "deberta-v2", "gpt2", "llama", "qwen3_moe", "t5"])
def test_layers_leave_with_units_of_others(kind: str, tmp_path: Path) -> None:
    model = deep(kind)
    mask_some_(model)
    drop_layers_(model, [2])
    check(model, tmp_path / "model", stock=False)


def test_a_scale_that_depends_on_the_layer_is_no_stock_model(tmp_path: Path) -> None:
    model = deep("gpt2", scale_attn_by_inverse_layer_idx=True)
    drop_layers_(model, [1])
    check(model, tmp_path / "model", stock=False)


@pytest.mark.parametrize(("kind", "first"), [("gpt2", 0), ("llama", 0), ("gemma3_text", 0), ("t5", 1)])
def test_generation_counts_tokens_without_the_layer(kind: str, first: int) -> None:
    changes: dict[str, Any] = {"decoder_start_token_id": 0} if kind == "t5" else {}
    model = deep(kind, "AutoModelForSeq2SeqLM" if kind == "t5" else "AutoModelForCausalLM", **changes)
    drop_layers_(model, [first])
    shrunk = copy.deepcopy(model)
    shrink_(shrunk)
    inputs = {key: value for key, value in example_inputs(model).items() if key != "decoder_input_ids"}
    longer: list[Any] = [m.generate(**inputs, max_new_tokens=6, do_sample=False) for m in (model, shrunk)]  # type: ignore[operator]
    assert torch.equal(*longer)


def test_layers_that_others_need_are_no_units() -> None:
    assert [stack.needed for stack in find_stacks(deep("t5"))] == [(0,), (0,)]  # the relative positions of all
    assert [stack.needed for stack in find_stacks(deep("deberta-v2", conv_kernel_size=3))] == [(0,)]
    assert [stack.needed for stack in find_stacks(deep("deberta-v2"))] == [()]
    norms = {"layer_norm_elementwise_affine": False}
    assert [stack.units for stack in find_stacks(deep("opt", **norms))] == [(0, 1, 2, 3)]
    assert [stack.units for stack in find_stacks(deep("opt", do_layer_norm_before=False, **norms))] == [()]
    assert find_stacks(deep("albert")) == []


def test_a_norm_after_the_sum_passes_what_a_layer_that_left_is_given(tmp_path: Path) -> None:
    model = deep("opt", do_layer_norm_before=False)
    drop_layers_(model, [0, 3])
    check(model, tmp_path / "model", stock=True)


def test_the_gate_takes_layers_whole() -> None:
    model = deep("bert")
    plan = make_plan(model, parse_leap({"target": 0.5, "gates": [{"granularity": "depth", "min_keep": 2}]}))
    (gate,) = plan.gates
    assert (gate.name, gate.num_units, gate.min_keep) == ("encoder.layer:depth", 4, 2)
    assert plan.prunable == sum(model.get_parameter(t).numel() for t in plan.covers if t.endswith("weight")) - sum(
        model.get_parameter(t).numel() for t in plan.covers if "LayerNorm.weight" in t
    )
    assert set(plan.covers) == {name for name, _ in model.named_parameters() if name.startswith("encoder.layer.")}
    chosen = {"granularity": "depth", "exclude": ["encoder.layer.0"]}
    assert make_plan(model, parse_leap({"target": 0.5, "gates": [chosen]})).gates[0].num_units == 3
    with pytest.raises(UserError, match=r"leap.gates\[0\]: leap.include and leap.exclude leave no whole layer"):
        make_plan(model, parse_leap({"target": 0.5, "gates": ["depth"], "exclude": ["re:encoder.layer"]}))
    assert len(find_structures(model)) == 8
