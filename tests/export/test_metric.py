"""Metrics measured anew on a run's data: on validation alone, with the class ids of the run's model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from leap_dist.export.latency import torch_runner
from leap_dist.export.metric import Judged, judge
from leap_dist.export.shrunk import Models
from leap_dist.run_folder import read_run
from tests.export.runs import SIZES, classifier, language_model, make_run
from tests.tasks.conftest import WORDS, cache_folder, tokenizer

__all__ = ["cache_folder", "tokenizer"]

pytestmark = pytest.mark.slow


def judged(folder: Path, model: Any, tokenizer: Any, **data: Any) -> Judged:
    """A run with such a model and data, judged beside itself. What it was trained on is gone."""
    run = make_run(folder / "run", model, {})
    tokenizer.save_pretrained(run / "model")
    models = Models(replace(read_run(run), job={"leap": {}, "model": {}, "data": data}))
    found = judge(models, torch_runner(models.masked))
    assert isinstance(found, Judged), found
    assert found.before == found.after
    return found


def answers(model: Any, tokenizer: Any) -> list[tuple[str, int]]:
    """Texts that the model sees in its first or last class, and the class; the model is changed to know all three."""
    texts = [f"{first} {second}" for first in WORDS for second in WORDS]
    with torch.no_grad():
        logits = model(**tokenizer(texts, return_tensors="pt")).logits
        model.classifier.bias -= logits.mean(0)
    chosen = (logits - logits.mean(0)).argmax(-1).tolist()
    assert set(chosen) == {0, 1, 2}
    return [(text, number) for text, number in zip(texts, chosen, strict=True) if number != 1]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


@pytest.mark.parametrize("names", [("apple", "pear", "plum"), (0, 1, 2), (1, 2, 3), ("B", "a", "b")])
@pytest.mark.parametrize("split", [False, True])
def test_a_class_that_validation_lacks(names: tuple[Any, ...], split: bool, tmp_path: Path, tokenizer: Any) -> None:
    model = classifier()
    model.config.id2label = dict(enumerate(map(str, names)))
    rows = [{"text": text, "label": names[number]} for text, number in answers(model, tokenizer)]
    file = write_rows(tmp_path / "data" / "test.jsonl", rows)
    given: dict[str, Any] = {"train": "gone.jsonl", "validation": file}
    if split:
        given = {"dataset": str(tmp_path / "data"), "validation": "test"}
    found = judged(tmp_path, model, tokenizer, task="text/classification", text="text", **given)
    assert found.before["accuracy"] == 1.0 and found.of == len(rows)


@pytest.mark.parametrize(
    "given",
    [
        {"train": "gone.txt", "validation": "{0}/test.jsonl"},
        {"dataset": "gone", "validation": "{0}/test.jsonl", "streaming": True},
        {"dataset": "{0}", "validation": "test"},
        {"dataset": "{0}", "validation": "test", "streaming": True},
    ],
)
def test_a_text_that_is_shorter_than_a_block(given: dict[str, Any], tmp_path: Path, tokenizer: Any) -> None:
    model = language_model()
    write_rows(tmp_path / "data" / "test.jsonl", [{"text": "a good film"}])
    data = {key: value.format(tmp_path / "data") if isinstance(value, str) else value for key, value in given.items()}
    found = judged(tmp_path, model, tokenizer, task="lm", max_length=16, **data)
    ids = tokenizer("a good film", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:]).item()
    assert found.of == 1 and found.before["loss"] == pytest.approx(loss, rel=1e-5)


def test_questions_of_a_named_split(tmp_path: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForQuestionAnswering, BertConfig

    torch.manual_seed(0)
    model = AutoModelForQuestionAnswering.from_config(
        BertConfig(**SIZES | {"max_position_embeddings": 40, "num_labels": 2})
    )
    text = "film plot a b c d"
    row = {"id": "1", "question": "good", "context": text, "answers": {"text": ["film"], "answer_start": [0]}}
    write_rows(tmp_path / "data" / "test.jsonl", [row])
    data = {"task": "squad", "max_length": 32, "dataset": str(tmp_path / "data"), "validation": "test"}
    found = judged(tmp_path, model.eval(), tokenizer, **data)
    with torch.no_grad():
        output = model(**tokenizer("good", text, return_tensors="pt"))
    first = torch.tensor([3])  # behind [CLS] good [SEP]
    loss = (F.cross_entropy(output.start_logits, first) + F.cross_entropy(output.end_logits, first)) / 2
    assert found.of == 1 and found.before["loss"] == pytest.approx(loss.item(), rel=1e-5)
