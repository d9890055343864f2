"""A model whose dead units have left computes what it did with them masked; its folder holds all of it, unharmed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

from leap_dist.config.family import FamilyConfig
from leap_dist.errors import UserError
from leap_dist.models.blocks import find_structures, find_sublayers
from leap_dist.models.outputs import example_inputs, logit_difference
from leap_dist.models.pruned_folder import load_pruned, save_shrunk
from leap_dist.models.routing import route_among_kept
from leap_dist.models.shrink import shrink_
from tests.models.test_families import NEOX, neox
from tests.models.tiny import EAGER_ONLY, SETTINGS, mask_some_, mask_units_, save_masked, tiny

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5  # fp32: the sums are the same, their order is not
CASES = [(kind, attention) for kind in SETTINGS for attention in ("eager", "sdpa")]
CASES = [(kind, attention) for kind, attention in CASES if attention == "eager" or kind not in EAGER_ONLY]
UNITS = [
    *((kind, "head") for kind in SETTINGS),
    *((kind, "neuron") for kind in SETTINGS if kind != "mixtral"),
    *((kind, "expert") for kind in ("mixtral", "qwen3_moe")),
]
GATED = {"feed_forward_proj": "gated-gelu"}


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def check_removal(model: PreTrainedModel, folder: Path, family: FamilyConfig | None = None) -> PreTrainedModel:
    """Shrink a copy of a masked model, compare; save it, load it, compare. Returns the shrunk copy."""
    route_among_kept(model)
    shrunk, inputs = copy.deepcopy(model), example_inputs(model)
    kept = shrink_(shrunk, family)
    assert logit_difference(model, shrunk, inputs) <= TOLERANCE
    assert num_parameters(shrunk) < num_parameters(model)
    save_shrunk(shrunk, kept, folder, family=family)
    loaded = load_pruned(folder, attn_implementation=model.config._attn_implementation)
    assert logit_difference(shrunk, loaded, inputs) == 0.0
    assert num_parameters(loaded) == num_parameters(shrunk)
    return shrunk


# ------------------------------------------------------------------------------ every architecture


@pytest.mark.parametrize(("kind", "attention"), CASES)
def test_a_shrunk_model_computes_what_the_masked_one_did(kind: str, attention: str, tmp_path: Path) -> None:
    model = tiny(kind, attention=attention)
    left = mask_some_(model)
    assert shrink_(copy.deepcopy(model)) == left
    check_removal(model, tmp_path / "model")


@pytest.mark.parametrize(("kind", "attention"), CASES)
def test_blocks_that_lose_everything_add_nothing(kind: str, attention: str, tmp_path: Path) -> None:
    model = tiny(kind, attention=attention)
    for structure in find_structures(model)[::2]:
        mask_units_(model, structure, range(structure.num_units))
    shrunk = check_removal(model, tmp_path / "model")
    assert len(find_structures(shrunk)) < len(find_structures(model))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "mixtral", "phi3", "t5"])
def test_whole_sublayers_leave(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    for sublayer in find_sublayers(model):
        mask_units_(model, sublayer, [0])
    check_removal(model, tmp_path / "model")


@pytest.mark.parametrize(
    ("kind", "head", "changes"),
    [
        ("albert", "AutoModelForMaskedLM", {}),
        ("bert", "AutoModelForQuestionAnswering", {}),
        ("deberta-v2", "AutoModelForTokenClassification", {"share_att_key": True}),
        ("electra", "AutoModelForSequenceClassification", {"num_labels": 3}),
        ("gemma3_text", "AutoModelForSequenceClassification", {"num_labels": 3}),
        ("qwen2", "AutoModelForCausalLM", {"tie_word_embeddings": True}),
        ("t5", "AutoModelForSeq2SeqLM", GATED),
        ("t5", "AutoModelForSequenceClassification", {"num_labels": 3}),
        ("t5", "T5EncoderModel", GATED),
        ("t5", "AutoModelForTokenClassification", {}),
        ("vit", "AutoModelForImageClassification", {"num_labels": 3}),
    ],
)
def test_any_head_and_tied_weights(kind: str, head: str, changes: dict[str, Any], tmp_path: Path) -> None:
    attention = "eager" if kind in EAGER_ONLY else "sdpa"
    model = tiny(kind, head, attention, **changes)
    mask_some_(model)
    check_removal(model, tmp_path / "model")


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("gpt2", "AutoModelForCausalLM"),
        ("llama", "AutoModelForCausalLM"),
        ("t5", "AutoModelForSeq2SeqLM"),
    ],
)
def test_generation_counts_tokens_without_the_first_attention(kind: str, head: str) -> None:
    changes: dict[str, Any] = {"decoder_start_token_id": 0} if kind == "t5" else {}
    model = tiny(kind, head, **changes)
    structures = [structure for structure in find_structures(model) if structure.kind == "head"]
    for structure in structures[:1] if kind != "t5" else structures[-2:]:
        mask_units_(model, structure, range(structure.num_units))
    mask_units_(model, structures[1], [0])
    shrunk = copy.deepcopy(model)
    shrink_(shrunk)
    inputs = {key: value for key, value in example_inputs(model).items() if key != "decoder_input_ids"}
    longer: list[Any] = [m.generate(**inputs, max_new_tokens=6, do_sample=False) for m in (model, shrunk)]  # type: ignore[operator]
    assert torch.equal(*longer)


def test_an_unknown_architecture_with_a_section(tmp_path: Path) -> None:
    family, model = FamilyConfig.model_validate(NEOX), neox()
    for place, structure in enumerate(find_structures(model, family)):
        mask_units_(model, structure, range(structure.num_units) if place == 0 else [1, 2])
    assert isinstance(model, PreTrainedModel)
    check_removal(model, tmp_path / "model", family)


# ------------------------------------------------------------------------------ what is dead


@torch.no_grad()
def test_units_that_any_gate_emptied_leave() -> None:
    model = tiny("bert")
    head, neuron = find_structures(model)[:2]
    layer = model.get_submodule("encoder.layer.0")
    layer.get_parameter("attention.self.value.weight")[:8] = 0
    layer.get_parameter("attention.self.value.bias")[:8] = 0
    layer.get_parameter("attention.output.dense.weight")[:, 8:16] = 0
    layer.get_parameter("attention.self.value.weight")[16:24] = 0  # its bias still speaks
    layer.get_parameter("intermediate.dense.weight")[:2] = 0
    layer.get_parameter("intermediate.dense.bias")[0] = 0
    layer.get_parameter("output.dense.weight")[:, 5] = 0
    shrunk = copy.deepcopy(model)
    kept = shrink_(shrunk)
    assert kept[head.name] == [2, 3]
    assert kept[neuron.name] == [1, 2, 3, 4, *range(6, 24)]
    assert logit_difference(model, shrunk, example_inputs(model)) <= TOLERANCE


@torch.no_grad()
def test_a_neuron_without_inputs_stays_if_its_activation_gives_something() -> None:
    model = tiny("bert", hidden_act="sigmoid")
    layer = model.get_submodule("encoder.layer.0.intermediate.dense")
    layer.get_parameter("weight")[0] = 0
    layer.get_parameter("bias")[0] = 0
    assert shrink_(model)["encoder.layer.0.ffn"] == list(range(24))


@torch.no_grad()
@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
def test_a_gated_neuron_dies_with_any_of_its_three_parts(projection: str) -> None:
    model = tiny("mistral")
    weight = model.get_parameter(f"layers.0.mlp.{projection}.weight")
    (weight.T if projection == "down_proj" else weight)[3] = 0
    assert shrink_(model)["layers.0.mlp"] == [unit for unit in range(24) if unit != 3]


def test_fewer_experts_than_a_token_was_given() -> None:
    model = tiny("qwen3_moe", "AutoModelForCausalLM")
    experts = next(structure for structure in find_structures(model) if structure.kind == "expert")
    mask_units_(model, experts, [0, 3])
    shrink_(model)
    router = model.get_submodule(f"{experts.name}.gate")
    assert (router.top_k, router.num_experts, model.num_experts, model.num_experts_per_tok) == (2, 2, 2, 2)


def test_a_dense_model_keeps_everything() -> None:
    model = tiny("bert")
    before = copy.deepcopy(model)
    kept = shrink_(model)
    assert all(kept[structure.name] == list(range(structure.num_units)) for structure in find_structures(before))
    assert logit_difference(before, model, example_inputs(model)) == 0.0


def test_what_gives_no_result_cannot_be_compared() -> None:
    class Silent(nn.Module):
        def forward(self) -> dict[str, int]:
            return {"loss": 1}

    with pytest.raises(UserError, match=r"^Silent: gives none of logits, .*; got loss$"):
        logit_difference(Silent(), Silent(), {})


@pytest.mark.quick
def test_a_t5_can_lose_heads_twice() -> None:
    model = tiny("t5")
    for _ in range(2):
        for structure in find_structures(model):
            mask_units_(model, structure, [0])
        shrunk = copy.deepcopy(model)
        shrink_(shrunk)
        assert logit_difference(model, shrunk, example_inputs(model)) <= TOLERANCE
        model = shrunk


# ------------------------------------------------------------------------------ stock folders


@pytest.mark.parametrize(("kind", "units"), UNITS)
def test_uniform_plans_load_without_this_package(kind: str, units: str, tmp_path: Path) -> None:
    attention = "eager" if kind in EAGER_ONLY else "sdpa"
    model = tiny(kind, attention=attention)
    structures = [structure for structure in find_structures(model) if structure.kind == units]
    for structure in structures:
        mask_units_(model, structure, range(structure.num_units // 2))
    manifest, shrunk = save_masked(model, tmp_path / "model")
    free_head_size = (
        "gemma2",
        "gemma3_text",
        "llama",
        "mistral",
        "mixtral",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "vit",
    )
    assert manifest.stock == (units != "head" or kind in free_head_size)
    if manifest.stock:
        assert manifest.per_layer_config == {}
        load = AutoModel.from_pretrained
        for loaded in (f(tmp_path / "model", attn_implementation=attention) for f in (load, load_pruned)):
            assert logit_difference(shrunk, loaded, example_inputs(model)) == 0.0


def test_layers_that_differ_are_listed(tmp_path: Path) -> None:
    model = tiny("llama")
    structures = find_structures(model)
    mask_units_(model, structures[0], [1])
    mask_units_(model, structures[3], range(4))
    manifest, _ = save_masked(model, tmp_path / "model")
    assert not manifest.stock
    assert manifest.per_layer_config == {
        "0": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
        "1": {"intermediate_size": 20},
    }
    assert json.loads((tmp_path / "model" / "config.json").read_text())["intermediate_size"] == 24


def test_a_model_that_chooses_among_several_texts_is_refused_by_name() -> None:
    from transformers import BertConfig, BertForMultipleChoice

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = BertForMultipleChoice(BertConfig(vocab_size=20, **sizes))
    with pytest.raises(UserError, match=r"^BertForMultipleChoice: takes several texts an answer; allowed: .*"):
        logit_difference(model, model, example_inputs(model))
