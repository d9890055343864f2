"""Trained classifiers whose labels are in another order than the task's, or are other labels."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from leap_dist.config.sections import ModelConfig
from leap_dist.models.load import load_model
from tests.models.test_load import make_task
from tests.models.tiny import SETTINGS

WORDS = torch.tensor([[5, 6, 7, 2], [8, 9, 4, 2]])
FAMILIES = ("bert", "roberta", "deberta-v2", "distilbert", "electra", "gpt2", "llama", "t5")


def save(folder: Path, kind: str, names: tuple[str, ...]) -> tuple[Path, Tensor]:
    """A classifier with these labels, and its logits."""
    ends = {"eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 0} if kind in ("llama", "t5") else {}
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **(SETTINGS[kind] | ends | labels))
    model = AutoModelForSequenceClassification.from_config(config).eval()
    for parameter in model.parameters():  # biases of new heads are 0
        torch.nn.init.normal_(parameter.data, std=0.2)
    model.save_pretrained(folder)
    return folder, model(WORDS).logits.detach()


def load(folder: Path, *names: str) -> tuple[dict[int, str], Tensor]:
    """The labels and the logits of what a job would start with."""
    task = dataclasses.replace(make_task(len(names)), label_names=names)
    model = load_model(ModelConfig(name=str(folder)), task).eval()
    assert model.config.label2id == {label: number for number, label in model.config.id2label.items()}
    return model.config.id2label, model(WORDS).logits.detach()


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_trained_head_takes_the_order_of_the_task(kind: str, tmp_path: Path) -> None:
    folder, logits = save(tmp_path, kind, ("CONTRADICTION", "not_entailment", "Entailment"))
    labels, found = load(folder, "entailment", "contradiction", "not entailment")
    assert labels == {0: "entailment", 1: "contradiction", 2: "not entailment"}
    torch.testing.assert_close(found, logits[:, [2, 0, 1]])
    assert not torch.allclose(found, logits)


def test_numbers_in_another_order(tmp_path: Path) -> None:
    """A name that is a number would be taken for the number of another class when the export is judged."""
    folder, logits = save(tmp_path, "bert", ("1", "2", "0"))
    labels, found = load(folder, "0", "1", "2")
    assert labels == {0: "0", 1: "1", 2: "2"}
    torch.testing.assert_close(found, logits[:, [2, 0, 1]])


@pytest.mark.parametrize(
    ("own", "wanted", "labels"),
    [
        (("no", "yes"), ("no", "yes"), {0: "no", 1: "yes"}),
        (("yes", "no"), ("0", "1"), {0: "yes", 1: "no"}),
        (("LABEL_0", "LABEL_1"), ("no", "yes"), {0: "no", 1: "yes"}),
        (("NEG", "POS"), ("no", "yes"), {0: "no", 1: "yes"}),
        (("5", "3"), ("0", "1"), {0: "0", 1: "1"}),
    ],
)
def test_a_trained_head_stays_as_it_is(
    own: tuple[str, ...],
    wanted: tuple[str, ...],
    labels: dict[int, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, logits = save(tmp_path, "bert", own)
    with caplog.at_level(logging.WARNING, logger="leap_dist.models.labels"):
        named, found = load(folder, *wanted)
    assert named == labels
    torch.testing.assert_close(found, logits)
    taken = f"{', '.join(own)}, which are taken for {', '.join(wanted)}, in this order"
    said = [f"{folder}: its head was trained for the labels {taken}"]
    assert [record.getMessage() for record in caplog.records] == (said if own[0] in ("NEG", "5") else [])


def test_a_head_for_another_number_of_labels_is_new(tmp_path: Path) -> None:
    folder, _ = save(tmp_path, "bert", ("no", "yes"))
    assert load(folder, "yes", "no", "perhaps")[0] == {0: "yes", 1: "no", 2: "perhaps"}
