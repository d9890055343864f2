"""A narrower residual stream: what is left computes what the masked model did, and is a stock model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from leap_dist.config.job_file import parse_leap
from leap_dist.core.gates import GatePlan
from leap_dist.errors import UserError
from leap_dist.models.blocks import find_structures
from leap_dist.models.families import FAMILIES
from leap_dist.models.kept import compute_among_kept
from leap_dist.models.outputs import example_inputs, logit_difference
from leap_dist.models.plan import make_plan
from leap_dist.models.pruned_folder import load_pruned, save_shrunk
from leap_dist.models.shrink import shrink_
from leap_dist.models.stacks import find_stacks
from leap_dist.models.stream import stream_of
from tests.models.tiny import DEEPER, EAGER_ONLY, HEADS, mask_some_, mask_units_, tiny

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
KEPT = [index for index in range(32) if index % 4 != 1]  # 24 of 32
BY_HEADS = ("albert", "bert", "deberta", "deberta-v2", "distilbert", "electra", "gpt2", "opt", "roberta")
"""Their width is heads times head size, in every config."""
EPSILON = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe"), "rms_norm_eps"),
    "t5": "layer_norm_epsilon",
}


def model_of(kind: str, head: str | None = None, **changes: Any) -> Any:
    return tiny(kind, head or HEADS[kind], "eager" if kind in EAGER_ONLY else "sdpa", **changes)


@torch.no_grad()
def narrow_(model: nn.Module) -> None:
    """Mask the dimensions that are not in KEPT, as a gate does."""
    gone = torch.tensor([index for index in range(32) if index not in KEPT])
    for part in stream_of(model).parts:
        model.get_parameter(part.tensor).index_fill_(part.axis, gone, 0.0)
    compute_among_kept(model, ["expert"], dict(model.named_parameters()))


def check(model: Any, folder: Path, stock: bool) -> dict[str, Any]:
    """Shrink a copy, save it, and load it both ways; the config that was written."""
    shrunk = copy.deepcopy(model)
    for module in shrunk.modules():
        module._forward_hooks.clear()
    kept = shrink_(shrunk)
    assert kept["stream"] == KEPT
    manifest = save_shrunk(shrunk, kept, folder)
    assert manifest.stock == stock
    loaders = [load_pruned, *([type(model).from_pretrained] if stock else [])]
    for load in loaders:
        loaded = load(folder, attn_implementation=model.config._attn_implementation)
        assert logit_difference(model, loaded, example_inputs(model, 2, 12)) <= TOLERANCE
        assert {n: p.shape for n, p in loaded.named_parameters()} == {n: p.shape for n, p in shrunk.named_parameters()}
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_narrower_model_is_a_stock_model(kind: str, tmp_path: Path) -> None:
    changes = {"head_dim": 4} if kind in ("gemma2", "gemma3_text", "llama", "mistral", "mixtral", "qwen3") else {}
    model = model_of(kind, **changes)
    narrow_(model)
    if kind in BY_HEADS:
        for structure in find_structures(model):
            if structure.kind == "head":
                mask_units_(model, structure, [1])
    config = check(model, tmp_path / "model", stock=True)
    key = FAMILIES[kind].hidden[0]
    assert config[key] == 24
    if kind in EPSILON:
        assert config[EPSILON[kind]] == pytest.approx(getattr(model.config, EPSILON[kind]) * 32 / 24)


@pytest.mark.parametrize("kind", BY_HEADS)
def test_a_width_that_heads_do_not_give_is_no_stock_model(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    narrow_(model)
    check(model, tmp_path / "model", stock=False)


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind != "albert"])
def test_with_units_of_all_other_kinds(kind: str, tmp_path: Path) -> None:
    model = model_of(kind, **DEEPER[kind])
    mask_some_(model)
    stacks = find_stacks(model)
    for stack in stacks:
        for tensor in stack.tensors[2]:
            model.get_parameter(tensor).data.zero_()
    narrow_(model)
    check(model, tmp_path / "model", stock=False)
    left = [type(module).__name__ for module in load_pruned(tmp_path / "model").modules()]
    assert left.count("NoLayer") == len(stacks)


@pytest.mark.parametrize(
    ("kind", "head", "changes"),
    [
        ("bert", "AutoModelForSequenceClassification", {"num_labels": 3}),
        ("bert", "AutoModelForQuestionAnswering", {}),
        ("roberta", "AutoModelForSequenceClassification", {"num_labels": 3}),
        ("deberta-v2", "AutoModelForSequenceClassification", {"num_labels": 3}),
        ("deberta-v2", "AutoModelForMaskedLM", {"share_att_key": True, "conv_kernel_size": 3}),
        ("electra", "AutoModelForSequenceClassification", {"embedding_size": 32}),
        ("gemma3_text", "AutoModelForSequenceClassification", {"num_labels": 3}),
        ("gpt2", "AutoModelForSequenceClassification", {"num_labels": 1}),
        ("llama", "AutoModelForCausalLM", {"tie_word_embeddings": True}),
        ("opt", "AutoModelForCausalLM", {"do_layer_norm_before": False, "word_embed_proj_dim": 20}),
        ("qwen3", "AutoModelForCausalLM", {"tie_word_embeddings": True, "rms_norm_eps": 0.1}),
        ("gemma3_text", "AutoModelForCausalLM", {"rms_norm_eps": 0.1}),
        ("t5", "AutoModelForSeq2SeqLM", {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}),
        ("t5", "AutoModelForSequenceClassification", {"num_labels": 3}),
        ("t5", "AutoModelForQuestionAnswering", {}),
    ],
)
def test_any_head_tied_weights_and_large_epsilons(
    kind: str, head: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    model = model_of(kind, head, **changes)
    narrow_(model)
    check(model, tmp_path / "model", stock=kind not in BY_HEADS)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "gemma2", "vit"])
def test_hidden_states_without_a_head_are_those_of_the_dimensions_left(kind: str) -> None:
    model = model_of(kind, "AutoModel")
    narrow_(model)
    shrunk = copy.deepcopy(model)
    shrink_(shrunk)
    inputs = example_inputs(model)
    with torch.no_grad():
        whole, narrow = (m(**inputs).last_hidden_state for m in (model, shrunk))
    torch.testing.assert_close(narrow, whole[..., KEPT], atol=1e-5, rtol=1e-5)
    assert not whole[..., [index for index in range(32) if index not in KEPT]].any()


# ------------------------------------------------------------------------------ the gate


def plan_of(model: nn.Module, **leap: Any) -> GatePlan:
    return make_plan(model, parse_leap({"target": 0.5, "gates": ["hidden"], **leap}))


def test_a_dimension_is_a_column_where_it_is_read_a_row_where_it_is_written_and_an_entry_of_norms() -> None:
    model = model_of("llama")
    (gate,) = plan_of(model).gates
    assert (gate.name, gate.num_units) == ("stream:hidden", 32)
    axes = {part.tensor: part.axis for part in stream_of(model).parts}
    assert axes["model.embed_tokens.weight"] == axes["lm_head.weight"] == 1
    assert axes["model.layers.0.self_attn.q_proj.weight"] == axes["model.layers.0.mlp.up_proj.weight"] == 1
    assert axes["model.layers.0.self_attn.o_proj.weight"] == axes["model.layers.0.mlp.down_proj.bias"] == 0
    assert axes["model.norm.weight"] == 0
    assert "model.layers.0.self_attn.q_proj.bias" not in axes
    counted = {part.tensor for part in gate.slices if part.counted}
    assert counted == {name for name in axes if model.get_parameter(name).dim() == 2}


def test_a_matrix_between_two_widths_goes_with_its_rows_and_its_columns() -> None:
    model = model_of("bert", "AutoModelForSequenceClassification")
    plan = plan_of(model)
    assert [len(cover.slices) for cover in plan.covers["bert.pooler.dense.weight"]] == [1, 1]
    assert plan.numel("bert.pooler.dense.weight") == 32 * 32
    assert plan.prunable == sum(model.get_parameter(t).numel() for t in plan.covers if plan.counted(t))


@pytest.mark.parametrize(
    ("kind", "changes", "leap", "match"),
    [
        ("opt", {"layer_norm_elementwise_affine": False}, {}, r"hidden'; opt has no stream .*norm without weights"),
        ("llama", {}, {"exclude": ["lm_head.weight"]}, r"lm_head.weight is left out in leap.exclude; change that"),
        ("mixtral", {}, {}, r"gates\[0\].multiple_of: got 1; allowed for 'hidden' where .* experts: a multiple of 8"),
        (
            "llama",
            {},
            {"gates": [{"granularity": "hidden", "include": ["a"]}]},
            r"\.include: got names; 'hidden' is one",
        ),
        (
            "llama",
            {},
            {"include": ["re:.*q_proj.weight"]},
            r"leap.include: got names; 'hidden' takes dimensions out of",
        ),
        ("deberta", {"talking_head": True}, {}, r"deberta has no stream .* more than its width of 32"),
    ],
)
def test_what_cannot_be_narrower_is_refused(
    kind: str, changes: dict[str, Any], leap: dict[str, Any], match: str
) -> None:
    with pytest.raises(UserError, match=match):
        plan_of(model_of(kind, **changes), **leap)


def test_unknown_architectures_and_frozen_tensors_are_refused() -> None:
    model = model_of("llama")
    model.lm_head.weight.requires_grad_(False)
    with pytest.raises(UserError, match=r"'hidden', which takes .*, but lm_head.weight is not trained"):
        plan_of(model)
    config = transformers.GPTNeoXConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    with pytest.raises(
        UserError, match=r"gates\[0\]: got 'hidden'; gpt_neox has no stream that can be narrower: the key"
    ):
        plan_of(transformers.GPTNeoXForCausalLM(config))
