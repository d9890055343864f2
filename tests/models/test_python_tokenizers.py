"""Tokenizers written in Python (no backend, no offsets): from a folder through the task to the loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ByT5Tokenizer, CanineTokenizer, EsmTokenizer

from leap_dist.config.sections import DataConfig, ModelConfig
from leap_dist.models.load import load_model, load_tokenizer
from leap_dist.tasks import load_task

pytestmark = pytest.mark.slow

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
LLAMA = {"model_type": "llama", "vocab_size": 384, **SIZES}
TEXT = "ACDE FGHI KLMN PQRS"


def esm(folder: Path) -> Any:
    words = ["<cls>", "<pad>", "<eos>", "<unk>", *"ACDEFGHIKLMNPQRSTVWY", "<mask>"]
    (folder / "words.txt").write_text("\n".join(words))
    return EsmTokenizer(str(folder / "words.txt"))


ESM = {"model_type": "esm", "vocab_size": 33, "position_embedding_type": "rotary", "pad_token_id": 1, **SIZES}
CANINE = {"model_type": "canine", "num_hash_buckets": 64, "max_position_embeddings": 64, "local_transformer_stride": 16}
MADE: dict[str, Callable[[Path], Any]] = {
    "esm": esm,
    "byt5": lambda _: ByT5Tokenizer(),
    "canine": lambda _: CanineTokenizer(),
}


@pytest.mark.parametrize(
    ("tokenizer", "task", "config"),
    [
        ("esm", "text/classification", ESM | {"mask_token_id": 24}),
        ("esm", "mlm", ESM | {"mask_token_id": 24}),
        ("byt5", "text/classification", LLAMA),
        ("byt5", "lm", LLAMA),
        ("canine", "text/classification", CANINE | SIZES),
    ],
)
def test_from_the_folder_to_the_loss(tokenizer: str, task: str, config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    MADE[tokenizer](tmp_path).save_pretrained(tmp_path / "tokenizer")
    classes = task == "text/classification"
    rows = [f"text,label\n{TEXT},0\n{TEXT} {TEXT},1\n"] if classes else [TEXT * 8]
    for name in ("train", "dev"):
        (tmp_path / name).with_suffix(".csv" if classes else ".txt").write_text(rows[0])
    files = {key: str(next(tmp_path.glob(f"{name}.*"))) for key, name in (("train", "train"), ("validation", "dev"))}
    data = DataConfig(task=task, max_length=32, **files, **({"text": "text"} if classes else {}))
    model = ModelConfig(from_config=config)
    read = load_tokenizer(model, str(tmp_path / "tokenizer"))
    assert not read.is_fast
    made = load_task(data, read)
    torch.manual_seed(0)
    loaded = load_model(model, made)
    batch = made.collate(made.train[:2])
    batch = made.augment(batch, [torch.Generator().manual_seed(row) for row in range(2)]) if made.augment else batch
    assert torch.isfinite(loaded(**{key: ids for key, ids in batch.items() if key != "bytes"}).loss)
    judged = made.evaluation.predict(loaded, made.collate(list(made.validation["validation"])))
    assert all(torch.isfinite(values.float()).all() for values in judged.values())
    if task == "lm":  # a byte a token, and nothing predicts the first of a block
        assert judged["bytes"].sum() == len(rows[0]) - len(made.validation["validation"])
