"""Folders whose weights are not all there, too many, or of another shape: only a head may be new."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from leap_dist.config.sections import ModelConfig
from leap_dist.errors import UserError
from leap_dist.models.load import load_model
from leap_dist.tasks.base import Problem
from tests.models.test_load import TINY, make_task
from tests.models.tiny import SETTINGS

BERT = TINY | {"num_hidden_layers": 2, "model_type": "bert"}
T5 = SETTINGS["t5"] | {"model_type": "t5", "eos_token_id": 1, "pad_token_id": 0}
GPT2 = SETTINGS["gpt2"] | {"model_type": "gpt2"}
LLAMA = SETTINGS["llama"] | {"model_type": "llama"}
State = dict[str, Tensor]


def save(cls: Any, settings: dict[str, Any], folder: Path, **changes: Any) -> Path:
    """A folder with the weights of one config and, with `changes`, a config.json that says something else."""
    torch.manual_seed(1)
    settings = dict(settings)
    cls.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def edit(folder: Path, change: Callable[[State], State]) -> None:
    file = folder / "model.safetensors"
    save_file({key: value.clone() for key, value in change(load_file(file)).items()}, file, metadata={"format": "pt"})


def load(folder: Path, problem: Problem = "single_label_classification", frozen: bool = False) -> Any:
    task = make_task(3, problem)
    if problem != "single_label_classification":
        task = dataclasses.replace(task, label_names=())
    return load_model(ModelConfig(name=str(folder)), task, frozen)


def without(part: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if part not in key}


# ------------------------------------------------------------------------------ the config says something else

ANOTHER = {
    "a layer more": ({"num_hidden_layers": 3}, r"bert\.encoder\.layer\.2\..* and 13 more are missing in its files"),
    "a layer less": ({"num_hidden_layers": 1}, r"encoder\.layer\.1\..* and 13 more are in its files, but no tensor"),
    "words": ({"vocab_size": 25}, r"word_embeddings\.weight \(\(20, 8\), not \(25, 8\)\) is of another shape"),
    "width": (
        {"intermediate_size": 12},
        r"layer\.0\.intermediate\.dense\.bias \(\(16,\), not \(12,\)\), .* 3 more are",
    ),
    "positions": ({"max_position_embeddings": 14}, r"position_embeddings\.weight \(\(12, 8\), not \(14, 8\)\)"),
}


@pytest.mark.parametrize(("changes", "message"), ANOTHER.values(), ids=ANOTHER.keys())
@pytest.mark.parametrize("cls", [AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification])
def test_weights_of_another_config(cls: Any, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """A bare encoder, one with the head of another task, and a classifier of two classes where three are wanted."""
    folder = save(cls, BERT, tmp_path / "model", **changes)
    with pytest.raises(UserError, match=rf"^model\.name: got .*, a bert model: .*{message}.*only the head may be new"):
        load(folder)


@pytest.mark.parametrize(
    ("cls", "settings", "problem", "lost"),
    [
        (AutoModelForCausalLM, LLAMA, "causal_lm", "model.norm.weight"),
        (AutoModelForCausalLM, LLAMA, "single_label_classification", "model.layers.1.mlp.up_proj.weight"),
        (AutoModelForCausalLM, GPT2, "causal_lm", "transformer.wpe.weight"),
        (AutoModelForMaskedLM, BERT, "masked_lm", "bert.embeddings.LayerNorm.bias"),
        (AutoModelForSeq2SeqLM, T5, "question_answering", "encoder.block.1.layer.0.SelfAttention.k.weight"),
        (AutoModelForSeq2SeqLM, T5, "single_label_classification", "shared.weight"),
    ],
)
def test_a_tensor_that_is_missing(
    cls: Any, settings: dict[str, Any], problem: Problem, lost: str, tmp_path: Path
) -> None:
    folder = save(cls, settings, tmp_path / "model")
    load(folder, problem)
    edit(folder, without(lost))
    with pytest.raises(UserError, match=rf"{lost.replace('.', '[.]')}.* missing in its files"):
        load(folder, problem)


def test_a_tensor_that_is_left_over(tmp_path: Path) -> None:
    folder = save(AutoModelForCausalLM, GPT2, tmp_path / "model")
    edit(folder, lambda state: state | {"transformer.h.0.attn.c_attn.lora_A": torch.zeros(2, 2)})
    with pytest.raises(UserError, match=r"h\.0\.attn\.c_attn\.lora_A is in its files, but no tensor of the model"):
        load(folder, "causal_lm")


def test_experts_of_another_number(tmp_path: Path) -> None:
    settings = SETTINGS["mixtral"] | {"model_type": "mixtral"}
    folder = save(AutoModelForCausalLM, settings, tmp_path / "model", num_local_experts=3)
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.experts\.down_proj \(\(4, .*\), not \(3, .*of another shape"):
        load(folder, "causal_lm")


def test_with_frozen_weights_a_head_is_not_made_anew(tmp_path: Path) -> None:
    folder = save(AutoModel, BERT, tmp_path / "model")
    load(folder)
    with pytest.raises(UserError, match=r"with frozen weights classifier\.bias, classifier\.weight would stay random"):
        load(folder, frozen=True)
    load(save(AutoModelForSequenceClassification, BERT | {"num_labels": 3}, tmp_path / "trained"), frozen=True)


@pytest.mark.parametrize("cls", [AutoModel, AutoModelForSequenceClassification])
def test_a_language_model_has_its_head(cls: Any, tmp_path: Path) -> None:
    """A random head that says the next token would be pruned and judged as if it were a model."""
    folder = save(cls, LLAMA, tmp_path / "model")
    with pytest.raises(UserError, match=r"its files have no head that says the next token: lm_head\.weight would be"):
        load(folder, "causal_lm")
    tied = save(cls, LLAMA | {"tie_word_embeddings": True}, tmp_path / "tied")
    assert torch.equal(load(tied, "causal_lm").lm_head.weight, load(tied, "causal_lm").model.embed_tokens.weight)


def test_a_head_of_another_width(tmp_path: Path) -> None:
    folder = save(AutoModelForSequenceClassification, BERT, tmp_path / "model")
    edit(folder, lambda state: state | {"classifier.weight": state["classifier.weight"][:, :6]})
    with pytest.raises(UserError, match=r"classifier\.weight \(\(2, 6\), not \(3, 8\)\) is of another shape"):
        load(folder)


# ------------------------------------------------------------------------------ what is normal


@pytest.mark.parametrize(
    ("cls", "settings", "problem", "new", "unused"),
    [
        (AutoModel, BERT, "single_label_classification", "classifier.bias, classifier.weight", None),
        (AutoModelForMaskedLM, BERT, "single_label_classification", "bert.pooler.dense.bias", "cls.predictions.bias"),
        (AutoModelForMaskedLM, BERT, "masked_lm", None, None),
        (AutoModelForSequenceClassification, BERT, "question_answering", "qa_outputs.bias", "bert.pooler.dense.bias"),
        (AutoModelForSequenceClassification, BERT, "single_label_classification", "classifier.bias", None),
        (AutoModelForCausalLM, LLAMA, "single_label_classification", "score.weight", "lm_head.weight"),
        (AutoModelForCausalLM, GPT2, "causal_lm", None, None),
        (AutoModelForSeq2SeqLM, T5, "question_answering", "qa_outputs.bias", None),
    ],
)
def test_a_new_head_and_one_that_is_not_used_are_reported(
    cls: Any,
    settings: dict[str, Any],
    problem: Problem,
    new: str | None,
    unused: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = save(cls, settings, tmp_path / "model")
    with caplog.at_level(logging.WARNING, logger="leap_dist.models.fit"):
        load(folder, problem)
    expected = [f"{folder}: {what}" for what, there in (("the head is new", new), ("not used", unused)) if there]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(expected) and all(map(str.startswith, said, expected))
    assert all(name in text for name, text in zip([name for name in (new, unused) if name], said, strict=True))


def test_buffers_that_old_files_hold_are_no_weights(tmp_path: Path) -> None:
    folder = save(AutoModelForCausalLM, GPT2, tmp_path / "gpt2")
    old = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1.0),
    }
    edit(folder, lambda state: state | old)
    load(folder, "causal_lm")
    folder = save(AutoModelForMaskedLM, BERT, tmp_path / "bert")
    edit(folder, lambda state: state | {"bert.embeddings.position_ids": torch.arange(12)[None]})
    load(folder)
