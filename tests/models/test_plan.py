"""From a model and the leap section to gates: what is chosen, what is left out, what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from leap_dist.config.job_file import parse_leap
from leap_dist.core.gates import GatePlan
from leap_dist.errors import UserError
from leap_dist.models.families import prunable_matrices
from leap_dist.models.plan import make_plan, match_names
from tests.models.tiny import tiny

LAYER = "bert.encoder.layer.{}."
LINEARS = (
    "attention.self.query.weight",
    "attention.self.key.weight",
    "attention.self.value.weight",
    "attention.output.dense.weight",
    "intermediate.dense.weight",
    "output.dense.weight",
)
ENCODER = [LAYER.format(layer) + linear for layer in range(2) for linear in LINEARS]


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    from transformers import AutoModelForSequenceClassification, BertConfig

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
    )
    model: nn.Module = AutoModelForSequenceClassification.from_config(config)
    return model


def plan(model: nn.Module, **section: Any) -> GatePlan:
    return make_plan(model, parse_leap({"target": 0.5, **section}))


def gated(model: nn.Module, **section: Any) -> list[str]:
    """The gated matrices of a plan, in its order."""
    found = plan(model, **section)
    return [name for name in found.covers if found.counted(name)]


# ------------------------------------------------------------------------------ chosen by default


def test_default_is_the_encoders_linear_weights(bert: nn.Module) -> None:
    found = plan(bert)
    assert sorted(found.covers) == sorted(ENCODER)
    assert found.prunable == 2 * (4 * 16 * 16 + 2 * 16 * 24)
    assert [gate.name for gate in found.gates] == [f"{name}:element" for name in found.covers]
    names = {name for name, _ in bert.named_parameters()}
    assert {"classifier.weight", "bert.pooler.dense.weight", "bert.embeddings.word_embeddings.weight"} <= names


def test_every_granularity_gets_a_gate_on_every_matrix(bert: nn.Module) -> None:
    found = plan(bert, gates=["block:8x8", "element"])
    assert len(found.gates) == 2 * len(ENCODER)
    assert all(found.hybrid(name) for name in ENCODER)
    assert found.prunable == plan(bert).prunable


def test_a_row_takes_its_bias_along_and_a_column_does_not(bert: nn.Module) -> None:
    rows, columns = plan(bert, gates=["row"]), plan(bert, gates=["column"])
    biases = {name.removesuffix("weight") + "bias" for name in ENCODER}
    assert set(rows.covers) == set(ENCODER) | biases
    assert not any(rows.counted(name) for name in biases)
    assert set(columns.covers) == set(ENCODER)


def test_a_frozen_bias_is_not_taken_along() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model.get_parameter("0.bias").requires_grad_(False)
    assert list(plan(model, gates=["row"]).covers) == ["0.weight"]


@pytest.mark.parametrize(
    ("model_type", "kind", "frozen", "effect"),
    [
        ("mixtral", "expert", "model.layers.1.mlp.gate.weight", "tokens would go to removed ones"),
        ("bert", "layer", "encoder.layer.1.output.dense.bias", "would stay of removed ones"),
    ],
)
def test_a_frozen_part_that_outlives_its_unit_is_refused(model_type: str, kind: str, frozen: str, effect: str) -> None:
    model = tiny(model_type, "AutoModel" if kind == "layer" else "AutoModelForCausalLM")
    model.get_parameter(frozen).requires_grad_(False)
    block = frozen.rpartition(".mlp.")[0] + ".mlp" if kind == "expert" else "encoder.layer.1.ffn"
    words = rf"^leap\.gates\[0\]: got '{kind}', but {frozen} is not trained, and {effect}; call .* leave {block} out in"
    with pytest.raises(UserError, match=words):
        plan(model, gates=[kind])
    assert plan(model, gates=[{"granularity": kind, "exclude": [block]}]).gates


def test_another_module_gives_all_linear_weights_but_the_last() -> None:
    model = nn.Sequential(
        nn.Embedding(5, 3), nn.Linear(3, 4), nn.Conv1d(4, 4, 1), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 2)
    )
    assert prunable_matrices(model) == ["1.weight", "3.0.weight"]
    assert gated(model) == ["1.weight", "3.0.weight"]


def test_frozen_weights_are_skipped() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model.get_parameter("0.weight").requires_grad_(False)
    assert gated(model) == ["1.weight"]


def test_tied_weights_are_gated_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    assert gated(model) == ["0.weight"]


# ------------------------------------------------------------------------------ chosen by name


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"include": [ENCODER[0]]}, ENCODER[:1]),
        ({"include": r"re:.*layer\.1\."} | {"exclude": [r"re:.*(bias|LayerNorm.*)$"]}, ENCODER[6:]),
        ({"include": ["classifier.weight", ENCODER[3]]}, [ENCODER[3], "classifier.weight"]),
        ({"exclude": [r"re:.*attention"]}, [name for name in ENCODER if "attention" not in name]),
        ({"exclude": ENCODER[1:]}, ENCODER[:1]),
        ({"include": r"re:.*query\.weight$", "exclude": [ENCODER[0]]}, [ENCODER[6]]),
        ({"exclude": ["classifier.weight"]}, ENCODER),
    ],
)
def test_include_and_exclude(bert: nn.Module, section: dict[str, Any], expected: list[str]) -> None:
    assert sorted(gated(bert, **section)) == sorted(expected)


def test_a_pattern_matches_from_the_start_of_a_name_and_the_order_is_the_models() -> None:
    names = ["a.weight", "b.a.weight", "a.bias"]
    assert match_names(names, ["re:a"], "key") == ["a.weight", "a.bias"]
    assert match_names(names, ["a.bias", "re:.*weight"], "key") == names
    assert match_names(iter(names), ["a.weight"], "key") == ["a.weight"]


# ------------------------------------------------------------------------------ refused


@pytest.mark.parametrize("key", ["include", "exclude"])
@pytest.mark.parametrize("pattern", ["re:gpt.*", "bert.encoder.layer.0", "re:weight"])
def test_a_pattern_that_matches_nothing_is_refused(bert: nn.Module, key: str, pattern: str) -> None:
    match = rf"^leap\.{key}: '{pattern}' matches no tensor .*; names look like bert\.embeddings\.word_emb.*, bert\."
    with pytest.raises(UserError, match=match.replace("re:gpt.*", r"re:gpt\.\*")):
        plan(bert, **{key: [ENCODER[0], pattern]})


@pytest.mark.parametrize(
    ("names", "patterns", "match"),
    [
        (["a"], ["re:("], r"^key: 're:\(' is not a regular expression \("),
        ([], ["a"], r"^key: 'a' matches no tensor of the model"),
    ],
)
def test_a_wrong_pattern_is_refused(names: list[str], patterns: Sequence[str], match: str) -> None:
    with pytest.raises(UserError, match=match):
        match_names(names, patterns, "key")


def all_frozen() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).requires_grad_(False)


@pytest.mark.parametrize("model", [nn.Linear(3, 4), nn.LayerNorm(4), all_frozen()])
def test_a_model_with_nothing_to_prune_is_refused(model: nn.Module) -> None:
    with pytest.raises(UserError, match=r"^leap\.gates\[0\]: 'row' matches no tensor of the model: .*leap\.include$"):
        plan(model, gates=["row", "element"])


def test_excluding_everything_is_refused(bert: nn.Module) -> None:
    with pytest.raises(UserError, match=r"^leap\.gates\[0\]: 'element' matches no tensor of the model"):
        plan(bert, exclude=["re:bert"])


def test_a_block_larger_than_a_matrix_is_refused(bert: nn.Module) -> None:
    match = r"^leap\.gates: 'block:16x24' is larger than .*query\.weight of 16x16; choose a smaller block"
    with pytest.raises(UserError, match=match):
        plan(bert, gates=["block:16x24"])


@pytest.mark.parametrize(
    ("pattern", "match"),
    [
        ("3:16", r"down\.weight, which has rows of 24, no multiple of 16; name .*; so it is with 1 more of 4 tensors$"),
        ("3:5", r"up\.weight, which has rows of 16, no multiple of 5; .* in leap\.exclude; none fits: choose another"),
    ],
)
def test_what_does_not_fit_says_how_many_more_do_not(pattern: str, match: str) -> None:
    layers = {f"{name}{i}": nn.Linear(*sizes) for i in "12" for name, sizes in (("up", (16, 24)), ("down", (24, 16)))}
    model = nn.ModuleDict({name.replace("1", ""): layer for name, layer in layers.items()})
    with pytest.raises(UserError, match=match):
        plan(model, gates=[pattern], include=["re:.*weight"])


def test_soft_masks_have_no_hidden_gate(bert: nn.Module) -> None:
    with pytest.raises(UserError, match=r'^leap\.rule: got "gumbel", .*, but "hidden" prunes .* by rows and by'):
        plan(bert, gates=["hidden"], rule="gumbel")


def test_a_vector_is_no_matrix(bert: nn.Module) -> None:
    with pytest.raises(
        UserError, match=r"^leap\.gates: 'element' needs matrices, but classifier\.bias has shape \(2,\)"
    ):
        plan(bert, include=["classifier.bias"])


# ------------------------------------------------------------------------------ structured gates and options


def units(found: GatePlan) -> dict[str, tuple[int, int]]:
    """(number of units, weights in one) by gate."""
    return {gate.name: (gate.num_units, gate.unit_size) for gate in found.gates}


def test_heads_and_neurons_cover_rows_columns_and_biases(bert: nn.Module) -> None:
    found = plan(bert, gates=["head", "neuron"])
    layer = "bert.encoder.layer.0"
    assert units(found)[f"{layer}.attention.self:head"] == (2, 4 * 16 * 8)
    assert units(found)[f"{layer}.ffn:neuron"] == (24, 2 * 16)
    assert found.prunable == plan(bert).prunable and found.linear
    assert found.covers.keys() == plan(bert).covers.keys() | {
        f"{path}.bias"
        for number in range(2)
        for path in (
            *(f"bert.encoder.layer.{number}.attention.self.{part}" for part in ("query", "key", "value")),
            f"bert.encoder.layer.{number}.intermediate.dense",
        )
    }


def test_a_gate_for_layers_has_the_sublayers_of_one_role_as_units(bert: nn.Module) -> None:
    assert units(plan(bert, gates=["layer"])) == {"attention:layer": (2, 4 * 16 * 16), "ffn:layer": (2, 2 * 16 * 24)}


def test_the_papers_hybrid(bert: nn.Module) -> None:
    found = plan(bert, gates=["head", "row", "block:4x4"])
    query = "bert.encoder.layer.0.attention.self.query.weight"
    assert [found.gates[cover.gate].granularity for cover in found.covers[query]] == ["head", "row", "block:4x4"]
    assert not found.linear


def test_options_belong_to_their_gate(bert: nn.Module) -> None:
    gates = [
        {"granularity": "head", "include": r"re:.*layer\.0"},
        {"granularity": "neuron", "exclude": "bert.encoder.layer.0.ffn", "multiple_of": 8, "min_keep": 3},
    ]
    found = plan(bert, gates=gates)
    assert [gate.name for gate in found.gates] == [
        "bert.encoder.layer.0.attention.self:head",
        "bert.encoder.layer.1.ffn:neuron",
    ]
    assert [(gate.min_keep, gate.multiple_of, gate.lowest) for gate in found.gates] == [(1, 1, 1), (3, 8, 8)]


def test_uniform_gates_are_tied(bert: nn.Module) -> None:
    found = plan(bert, gates=["head", {"granularity": "neuron", "uniform": True}])
    assert found.tied == ((0,), (1,), (2, 3))


def test_leap_include_and_exclude_choose_blocks_by_their_tensors(bert: nn.Module) -> None:
    chosen = plan(bert, gates=["head"], exclude=r"re:.*layer\.1\.attention\.output").gates
    assert [gate.name for gate in chosen] == ["bert.encoder.layer.0.attention.self:head"]
    chosen = plan(bert, gates=["neuron"], include=r"re:.*layer\.1\.output").gates
    assert [gate.name for gate in chosen] == ["bert.encoder.layer.1.ffn:neuron"]


@pytest.mark.parametrize(
    ("gates", "match"),
    [
        (["expert"], r"^leap\.gates\[0\]: got 'expert'; bert has none that is known here; allowed: element, .*family"),
        (
            [{"granularity": "neuron", "multiple_of": 64}],
            r"^leap\.gates\[0\]\.multiple_of: got 64, more than the 24 units of bert\.encoder\.layer\.0\.ffn:neuron; "
            r"allowed: at most 24, or leave the block out with leap\.gates\[0\]\.exclude$",
        ),
        ([{"granularity": "head", "min_keep": 3}], r"\.min_keep: got 3, more than the 2 units of"),
        (
            [{"granularity": "row", "uniform": True}],
            r"^leap\.gates\[0\]\.uniform: got true, but the units differ in number: .* name blocks of one size in",
        ),
        (["element", "2:4"], r"^leap\.gates: two gates for single weights on .* \(the second is 2:4\); keep one"),
        (
            [{"granularity": "row", "min_keep": 1}, {"granularity": "row", "min_keep": 2}],
            r"^leap\.gates: two gates for row on",
        ),
        (
            [{"granularity": "head", "include": "encoder"}],
            r"^leap\.gates\[0\]\.include: 'encoder' matches no block with",
        ),
        ([{"granularity": "head", "exclude": "re:.*"}], r"^leap\.gates\[0\]: leap\.include and leap\.exclude leave no"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(bert: nn.Module, gates: list[Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        plan(bert, gates=gates)


def test_a_head_on_a_model_that_has_none_is_refused() -> None:
    with pytest.raises(UserError, match=r"^leap\.gates\[0\]: got 'head'; Sequential has none that is known here"):
        plan(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), gates=["head"])


# ------------------------------------------------------------------------------ weights that are made from others


@pytest.mark.parametrize(
    ("change", "maker"),
    [
        (nn.utils.parametrizations.weight_norm, "_WeightNorm"),
        (nn.utils.parametrizations.spectral_norm, "_SpectralNorm"),
        (nn.utils.spectral_norm, "SpectralNorm"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "L1Unstructured"),
    ],
    ids=["weight norm", "spectral norm", "spectral norm of old", "torch's pruning"],
)
@pytest.mark.parametrize("gate", ["element", "row"])
def test_a_weight_that_is_made_from_others_is_refused_by_name(change: Any, maker: str, gate: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    change(model[0])
    with pytest.raises(
        UserError, match=rf"^leap\.gates: the weight of 0 \({maker}\) is not a parameter.*leap\.include"
    ):
        make_plan(model, parse_leap({"target": 0.5, "gates": gate}))
    plan = make_plan(model, parse_leap({"target": 0.5, "gates": gate, "include": "1.weight"}))
    assert [gate.slices[0].tensor for gate in plan.gates] == ["1.weight"]
