"""Language models: blocks that lose no token, masks that chance decides and a seed repeats, perplexity by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from leap_dist.config.sections import DataConfig
from leap_dist.errors import UserError
from leap_dist.tasks import load_task
from leap_dist.tasks.base import IGNORED
from leap_dist.tasks.lm import _pieces

WORDS = "a b c d good bad film plot"


@pytest.fixture
def texts(tmp_path: Path) -> Callable[..., DataConfig]:
    """Writes train and validation text and gives the data section."""

    def make(train: str, validation: str | None = None, suffix: str = ".txt", **settings: Any) -> DataConfig:
        paths = []
        for name, text in (("train", train), ("dev", train if validation is None else validation)):
            path = tmp_path / f"{name}{suffix}"
            path.write_text(text, "utf-8")
            paths.append(str(path))
        return DataConfig(**{"task": "lm", "train": paths[0], "validation": paths[1], "max_length": 8, **settings})

    return make


# ------------------------------------------------------------------------------ blocks


def test_blocks_hold_every_token_in_order(texts: Any, tokenizer: Any) -> None:
    task = load_task(texts("\ufeffa b c d\n\ngood bad\nfilm\nplot a b", "a " * 19), tokenizer)
    assert [example["input_ids"] for example in task.train] == [[4, 5, 6, 7, 8, 9, 10, 11]]  # the part block is dropped
    blocks = task.validation["validation"]
    assert [len(example["input_ids"]) for example in blocks] == [8, 8, 3]  # here it is not
    assert (task.problem, task.primary, task.max_length, task.vocab_size) == ("causal_lm", "perplexity", 8, 13)
    batch = task.collate([blocks[0], blocks[2]])
    assert batch["labels"].tolist() == [[4] * 8, [4] * 3 + [IGNORED] * 5]
    assert batch["attention_mask"].tolist() == [[1] * 8, [1] * 3 + [0] * 5]


def test_a_last_block_with_nothing_to_predict_is_dropped(texts: Any, tokenizer: Any) -> None:
    assert len(load_task(texts("a " * 17), tokenizer).validation["validation"]) == 2


def test_rows_of_a_table_are_lines(texts: Any, tokenizer: Any) -> None:
    rows = "\n".join(json.dumps({"body": text}) for text in ("a b c d", "good bad film plot"))
    task = load_task(texts(rows, suffix=".jsonl", text="body"), tokenizer)
    assert task.train[0]["input_ids"] == list(range(4, 12))


def test_a_dataset_of_rows(tmp_path: Path, tokenizer: Any) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for split in ("train", "validation"):
        lines = [json.dumps({"text": text}) for text in ("a b c d\n", "", "good bad film plot")]
        (folder / f"{split}.jsonl").write_text("\n".join(lines), "utf-8")
    task = load_task(DataConfig(task="lm", dataset=str(folder), max_length=8), tokenizer)
    assert task.train[0]["input_ids"] == list(range(4, 12))


def test_pieces_are_whole_lines() -> None:
    lines = [f"{i} " * 5000 + "\n" for i in range(60)]
    pieces = _pieces(lines)
    assert "".join(pieces) == "".join(lines)
    assert len(pieces) == 4 and all(piece.endswith("\n") for piece in pieces)


# ------------------------------------------------------------------------------ masks


def test_masked_blocks_stand_between_special_tokens(texts: Any, tokenizer: Any) -> None:
    task = load_task(texts(f"{WORDS} a", task="mlm"), tokenizer)
    blocks = task.validation["validation"]
    assert [len(example["input_ids"]) for example in blocks] == [8, 5]
    assert all(example["input_ids"][0] == 2 and example["input_ids"][-1] == 3 for example in blocks)
    assert all(max(example["labels"]) > 0 for example in blocks)  # every block has a word to judge
    assert (task.problem, task.primary) == ("masked_lm", "perplexity")
    again = load_task(texts(f"{WORDS} a", task="mlm"), tokenizer).validation["validation"]
    assert list(again) == list(blocks)


def test_how_many_words_are_left_out_and_how(texts: Any, tokenizer: Any) -> None:
    task = load_task(texts(f"{WORDS} " * 20, task="mlm", max_length=64, mask_probability=0.3), tokenizer)
    batch = task.collate([task.train[0]] * 400)
    ids = batch["input_ids"]
    assert "labels" not in batch and task.augment is not None
    masked = task.augment(batch, torch.Generator().manual_seed(3))
    chosen = masked["labels"] != IGNORED
    assert torch.equal(masked["labels"][chosen], ids[chosen])
    assert torch.equal(masked["input_ids"][~chosen], ids[~chosen])
    assert not chosen[:, [0, -1]].any()  # special tokens
    assert chosen[:, 1:-1].float().mean().item() == pytest.approx(0.3, abs=0.01)
    new = masked["input_ids"][chosen]
    assert (new == 12).float().mean().item() == pytest.approx(0.8 + 0.1 / 13, abs=0.02)
    assert (new == ids[chosen]).float().mean().item() == pytest.approx(0.1 + 0.1 / 13, abs=0.02)
    same = task.augment(batch, torch.Generator().manual_seed(3))
    other = task.augment(batch, torch.Generator().manual_seed(4))
    assert torch.equal(same["input_ids"], masked["input_ids"]) and not torch.equal(other["labels"], masked["labels"])


# ------------------------------------------------------------------------------ perplexity


def scored(task: Any, logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    kept = task.evaluation.predict(lambda **_: SimpleNamespace(logits=logits), batch)
    return task.evaluation.score("validation", kept)


def test_perplexity_is_that_of_torchmetrics_over_all_tokens(texts: Any, tokenizer: Any) -> None:
    """Blocks of two lengths: a mean over blocks would give something else."""
    from torchmetrics.text import Perplexity

    task = load_task(texts(WORDS, f"{WORDS} a b c"), tokenizer)
    batch = task.collate(task.validation["validation"][:])
    logits = torch.randn(2, 8, 13, generator=torch.Generator().manual_seed(0)) * 3
    metric = Perplexity(ignore_index=IGNORED)
    metric.update(logits[:, :-1], batch["labels"][:, 1:])
    values = scored(task, logits, batch)
    assert values["perplexity"] == pytest.approx(metric.compute().item(), rel=1e-5)
    assert values["loss"] == pytest.approx(math.log(values["perplexity"]))


def test_a_model_that_knows_nothing_and_one_that_knows_all(texts: Any, tokenizer: Any) -> None:
    task = load_task(texts(WORDS), tokenizer)
    batch = task.collate(task.validation["validation"][:])
    assert scored(task, torch.zeros(1, 8, 13), batch)["perplexity"] == pytest.approx(13)
    following = torch.nn.functional.one_hot(batch["input_ids"].roll(-1, 1), 13) * 50.0
    assert scored(task, following, batch) == pytest.approx({"perplexity": 1.0, "accuracy": 1.0, "loss": 0.0})


def test_masked_words_alone_are_judged(texts: Any, tokenizer: Any) -> None:
    task = load_task(texts(WORDS, task="mlm"), tokenizer)
    batch = task.collate(task.validation["validation"][:])
    right = batch["labels"].clamp(min=0)
    values = scored(task, torch.nn.functional.one_hot(right, 13) * 50.0, batch)
    assert values == pytest.approx({"perplexity": 1.0, "accuracy": 1.0, "loss": 0.0}, abs=1e-6)


# ------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("settings", "train", "message"),
    [
        ({}, " \n\n", r"data\.train: .*train\.txt: no text in it"),
        ({}, "a b c", r"data\.train: .*: got 3 tokens; allowed: at least 8 \(a block of data\.max_length\)"),
        ({"text": ("a", "b")}, WORDS, r"data\.text: got a, b; allowed: one column for lm"),
        ({"suffix": ".csv"}, "body\na", r'data\.text: got "text", which is not a column of .*; allowed: body'),
    ],
)
def test_refused(texts: Any, tokenizer: Any, settings: dict[str, Any], train: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_task(texts(train, **settings), tokenizer)


def test_too_little_to_judge(texts: Any, tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"data\.validation: .*: got 1 tokens; allowed: at least 2"):
        load_task(texts(WORDS, "a"), tokenizer)


def test_nothing_named(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"data\.train: missing; lm needs local files .*, or data\.dataset"):
        load_task(DataConfig(task="lm"), tokenizer)


def test_no_mask_token(texts: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tokenizer._special_tokens_map, "mask_token", None)
    with pytest.raises(UserError, match=r'data\.task: got "mlm"; the tokenizer has no mask token'):
        load_task(texts(WORDS, task="mlm"), tokenizer)


# ------------------------------------------------------------------------------ real text


def test_wikitext2_whole(data_dir: Path, tokenizer: Any) -> None:
    """Every word of the file is in a block."""
    file = data_dir / "wikitext2" / "wiki.test.raw.txt"
    if not file.is_file():
        pytest.skip(f"no {file}")
    backend = tokenizer.backend_tokenizer.pre_tokenizer
    words = len(backend.pre_tokenize_str(file.read_text("utf-8")))
    data = DataConfig(task="lm", train=str(file), validation=str(file), max_length=128)
    task = load_task(data, tokenizer)
    assert sum(len(example["input_ids"]) for example in task.validation["validation"]) == words
    assert len(task.train) == words // 128
