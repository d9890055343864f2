"""From a model and the leap section to gates: what is chosen, what is left out, what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from leap_dist.core.gates import GatePlan
from leap_dist.errors import UserError
from leap_dist.job_file import parse_leap
from leap_dist.models.families import prunable_matrices
from leap_dist.models.plan import make_plan, match_names

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


def test_a_vector_is_no_matrix(bert: nn.Module) -> None:
    with pytest.raises(
        UserError, match=r"^leap\.gates: 'element' needs matrices, but classifier\.bias has shape \(2,\)"
    ):
        plan(bert, include=["classifier.bias"])
