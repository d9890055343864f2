"""Where the heads, neurons and experts of each architecture are; what a user's `family` section may say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from transformers import AutoModel, Glm4MoeConfig, GPTNeoXConfig

from leap_dist.config.family import FamilyConfig
from leap_dist.errors import UserError
from leap_dist.models.blocks import find_structures, find_sublayers, tensor_shapes
from leap_dist.models.families import FAMILIES, family_of, prunable_matrices
from leap_dist.models.routing import route_among_kept
from leap_dist.models.structures import Structure
from tests.models.tiny import SETTINGS, mask_units_, tiny

NEOX: dict[str, Any] = {
    "layers": r"re:layers\.\d+",
    "attention": {
        "module": "attention",
        "qkv": "attention.query_key_value",
        "layout": "interleaved",
        "output": "attention.dense",
        "head_size": "attention.head_size",
    },
    "ffn": {"module": "mlp", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h", "activation": "mlp.act"},
}
"""The family section for an architecture that is in no table."""


def neox() -> nn.Module:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    model: nn.Module = AutoModel.from_config(config).eval()
    return model


def model_of(kind: str, **changes: Any) -> nn.Module:
    return tiny(kind, attention="eager", **changes)


# ------------------------------------------------------------------------------ what is found


def test_every_table_is_tested() -> None:
    assert FAMILIES.keys() == SETTINGS.keys()


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_parts_of_a_structure_cover_its_tensors_once(kind: str) -> None:
    model = model_of(kind)
    shapes = tensor_shapes(model)
    for structure in find_structures(model):
        covered: dict[str, torch.Tensor] = {}
        for part in structure.parts:
            count = covered.setdefault(part.tensor, torch.zeros(shapes[part.tensor]))
            count.narrow(part.axis, part.start, part.size * structure.num_units).add_(1)
        assert all((count == 1).all() for count in covered.values())


@pytest.mark.parametrize("kind", SETTINGS)
def test_structures_hold_all_prunable_weights_and_nothing_else(kind: str) -> None:
    model = model_of(kind)
    counted = [part.tensor for structure in find_structures(model) for part in structure.parts if part.counted]
    inside_experts = ("gate_proj", "up_proj", "down_proj") if kind == "mixtral" else ()
    assert [name for name in prunable_matrices(model) if not name.endswith(inside_experts)] == [
        name for name in tensor_shapes(model) if name in counted and not name.endswith(inside_experts)
    ]
    assert len(find_structures(model)) == {"albert": 2, "t5": 10}.get(kind, 4)


@pytest.mark.parametrize("kind", SETTINGS)
def test_sublayers_take_their_biases_and_leave_the_norms(kind: str) -> None:
    model = model_of(kind)
    sublayers = find_sublayers(model)
    shapes = tensor_shapes(model)
    assert len(sublayers) == {"albert": 0, "t5": 8}.get(kind, 4)
    for sublayer in sublayers:
        assert (sublayer.kind, sublayer.num_units) == ("layer", 1)
        names = {part.tensor for part in sublayer.parts}
        assert all((part.axis, part.start, part.size) == (0, 0, shapes[part.tensor][0]) for part in sublayer.parts)
        biases = {f"{name.removesuffix('weight')}bias" for name in names if name.endswith(".weight")}
        assert biases & shapes.keys() <= names
        assert not any("norm" in name.lower() for name in names)


def test_names_roles_and_kinds() -> None:
    found = {
        s.name: (s.kind, s.role, s.num_units) for s in find_structures(model_of("t5", feed_forward_proj="gated-gelu"))
    }
    assert found["decoder.block.1.layer.1.EncDecAttention"] == ("head", "cross_attention", 4)
    assert found["encoder.block.0.layer.1.DenseReluDense"] == ("neuron", "ffn", 24)
    names = [s.name for s in find_structures(model_of("bert"))]
    assert names[:2] == ["encoder.layer.0.attention.self", "encoder.layer.0.ffn"]


def test_a_unit_of_grouped_queries_is_a_key_value_head_with_its_query_heads() -> None:
    head = find_structures(model_of("phi3"))[0]
    rows = [(part.start, part.size) for part in head.parts if part.tensor.endswith("qkv_proj.weight")]
    assert (head.num_units, rows) == (2, [(0, 16), (32, 8), (48, 8)])
    assert {(r.attribute, r.per_unit) for r in head.resizes} == {
        ("num_key_value_heads", 1),
        ("config.num_attention_heads", 2),
    }


def test_mixed_heads_are_no_units() -> None:
    kinds = [structure.kind for structure in find_structures(model_of("deberta", talking_head=True))]
    assert kinds == ["neuron", "neuron"]


def test_decoders_with_cross_attention() -> None:
    model = model_of("bert", is_decoder=True, add_cross_attention=True)
    assert [s.role for s in find_structures(model)][:3] == ["attention", "cross_attention", "ffn"]


def test_shapes_are_those_of_the_whole_tensor_where_it_is_sharded() -> None:
    model = model_of("llama")
    expected = find_structures(model)
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    assert find_structures(model) == expected


def test_an_unknown_architecture_has_no_structures() -> None:
    assert find_structures(neox()) == find_sublayers(neox()) == find_structures(nn.Linear(2, 2)) == []


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "electra"])
def test_heads_and_routers_stay_dense(kind: str) -> None:
    head = {"electra": "AutoModelForMaskedLM"}.get(kind, "AutoModelForCausalLM")
    names = prunable_matrices(tiny(kind, head))
    inside = {"gpt2": ".h.", "mixtral": ".layers.", "electra": ".encoder.layer."}[kind]
    assert names and all(inside in name for name in names)
    assert not any(name.endswith("gate.weight") for name in names)


# ------------------------------------------------------------------------------ the user's section


def test_a_section_describes_an_unknown_architecture() -> None:
    family = FamilyConfig.model_validate(NEOX)
    found = find_structures(neox(), family)
    assert [(s.kind, s.num_units) for s in found] == [("head", 4), ("neuron", 24)] * 2
    assert len(find_sublayers(neox(), family)) == 4
    assert FamilyConfig.model_validate_json(family.model_dump_json()) == family


def changed(section: str, **fields: Any) -> dict[str, Any]:
    return NEOX | {section: NEOX[section] | fields}


@pytest.mark.parametrize(
    ("section", "match"),
    [
        (NEOX | {"layers": "layer.0"}, r"^family\.layers: 'layer\.0' matches no whole module path; .* mean layers\.0"),
        (NEOX | {"layers": "re:blocks"}, r"paths look like .*layers\.1"),
        (
            changed("attention", module="attn"),
            r"^family\.attention\[0\]\.module: got \"attn\"; layers\.0 and .* mean attention\?$",
        ),
        (changed("attention", qkv="attention.query_key_val"), r"\.qkv: got .* with a weight; did you mean att.*value"),
        (changed("ffn", down="mlp.act"), r"^family\.ffn\[0\]\.down: got \"mlp\.act\".*no such module with a weight"),
        (changed("ffn", activation="mlp.relu"), r"^family\.ffn\[0\]\.activation: got \"mlp\.relu\"; .* no such"),
        (changed("ffn", resize=["mlp.width"]), r"^family\.ffn\[0\]\.resize: got \"mlp\.width\"; .* no such attribute"),
        (changed("ffn", resize=["mlp.act"]), r"^family\.ffn\[0\]\.resize: .* holds .*; allowed: an integer"),
        (changed("attention", resize=["attention.rotary_ndims"]), r"which is 2; allowed: a multiple of 4 units"),
        (changed("attention", head_size=5), r"^family\.attention\[0\]\.head_size: got 5; allowed: a divisor of 32"),
        (changed("attention", head_size="attention.size"), r"\.head_size: got \"attention\.size\"; .* no such att"),
        (
            changed("attention", output="mlp.dense_4h_to_h"),
            r"3 units .* cover 72 indices of axis 0 of .*, which has 96;",
        ),
        (changed("ffn", down="shrug"), r"^family\.ffn\[0\]\.down: got \"shrug\".*; allowed: input_layernorm, "),
        (
            NEOX | {"experts": {"module": "mlp", "router": "mlp.dense_h_to_4h", "tensors": "mlp.dense_h_to_4h.weigh"}},
            r"^family\.experts\[0\]\.tensors: got .* no such tensor; did you mean mlp\.dense_h_to_4h\.weight",
        ),
        (
            NEOX | {"hidden": ["hiden_size"]},
            r'^family\.hidden\[0\]: got "hiden_size"; the config .* no such key; did you mean hidden_size\?$',
        ),
        (NEOX | {"epsilon": "eps"}, r'^family\.epsilon: got "eps"; the config of the model has no such key'),
        (NEOX | {"adds": "norm_frist"}, r'^family\.adds: got "norm_frist"; layers\.0 has no such attribute'),
        (
            NEOX | {"whole": "re:layer", "adds": "use_parallel_residual"},
            r"^family\.whole: 're:layer' matches no whole module path",
        ),
    ],
)
def test_wrong_names_are_refused(section: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        find_structures(neox(), FamilyConfig.model_validate(section))


@pytest.mark.parametrize(
    ("section", "match"),
    [
        (changed("attention", qkv=None), r"qkv: got none of them; allowed: qkv alone, or query, key and value"),
        (changed("attention", query="q"), r"qkv: got query and qkv; allowed"),
        (changed("ffn", up=None), r"up: got nothing; allowed: up, up and gate, or gate_up alone"),
        (changed("ffn", gate_up="x"), r"up: got up and gate_up; allowed"),
    ],
)
def test_impossible_blocks_are_refused(section: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        FamilyConfig.model_validate(section)


# ------------------------------------------------------------------------------ routing


def experts_of(model: nn.Module) -> Structure:
    return next(structure for structure in find_structures(model) if structure.kind == "expert")


@pytest.mark.parametrize(
    ("kind", "changes"), [("mixtral", {}), ("qwen3_moe", {}), ("qwen3_moe", {"norm_topk_prob": False})]
)
def test_routing_is_bit_for_bit_the_same_until_an_expert_is_pruned(kind: str, changes: dict[str, Any]) -> None:
    model = tiny(kind, **changes)
    router = model.get_submodule("layers.1.mlp.gate")
    states = torch.randn(5, 32)
    expected = router(states)
    handles = route_among_kept(model)
    assert all(torch.equal(a, b) for a, b in zip(router(states), expected, strict=True))
    for handle in handles:
        handle.remove()
    mask_units_(model, [s for s in find_structures(model) if s.kind == "expert"][-1], [1, 3])
    assert torch.equal(router(states)[0][:, [1, 3]], torch.zeros(5, 2))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_pruned_expert_gets_no_token(kind: str) -> None:
    model = tiny(kind)
    structure = experts_of(model)
    mask_units_(model, structure, [0, 2])
    route_among_kept(model)
    logits, scores, indices = model.get_submodule(f"{structure.name}.gate")(torch.randn(50, 32))
    assert torch.isinf(logits[:, [0, 2]]).all()
    assert (scores.masked_select((indices == 0) | (indices == 2)) == 0).all()
    assert torch.allclose(scores.sum(1), torch.ones(50))


def test_a_router_that_weighs_experts_otherwise_stays_as_it_is_and_none_may_leave() -> None:
    """GLM-4's: sigmoids, a bias that corrects them, groups, and a factor."""
    config = Glm4MoeConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=24,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=0,
        routed_scaling_factor=2.5,
    )
    model = AutoModel.from_config(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    described = {
        "module": "mlp",
        "router": "mlp.gate",
        "tensors": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    layers = ["re:(.+\\.)?layers\\.\\d+"]
    family = FamilyConfig.model_validate({"layers": layers, "experts": [described], "adds": True})
    ids = torch.arange(1, 25).view(2, 12)
    expected = model(ids).last_hidden_state
    assert not route_among_kept(model, family) and torch.equal(model(ids).last_hidden_state, expected)
    message = r"layers\.0\.mlp\.gate: this router does not weigh .* a softmax .*; remove \"expert\" from leap.gates"
    with pytest.raises(UserError, match=message):
        route_among_kept(model, family, to_prune=True)
    with torch.no_grad():
        model.get_submodule("layers.1.mlp.gate").weight[2] = 0.0
    with pytest.raises(UserError, match=message.replace("0", "1")):
        route_among_kept(model, family)


def test_a_router_without_experts_stays_finite() -> None:
    model = tiny("mixtral")
    structure = experts_of(model)
    mask_units_(model, structure, range(4))
    route_among_kept(model)
    assert all(torch.isfinite(part).all() for part in model.get_submodule(f"{structure.name}.gate")(torch.randn(5, 32)))
    assert family_of(model) is not None
