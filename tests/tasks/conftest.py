"""Fixtures of the tasks' tests: a small tokenizer, and caches in a folder of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from leap_dist.config.sections import DataConfig

WORDS = ["a", "b", "c", "d", "good", "bad", "film", "plot"]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A word-level BERT tokenizer over a few words: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, words from 4, [MASK] 12."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, "[MASK]"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tokenised data and what `datasets` makes go to a folder of the test's own."""
    import datasets

    from leap_dist.tasks import cache

    monkeypatch.setattr(cache, "cache_folder", lambda: tmp_path / "tokens")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path / "tokens"


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., DataConfig]:
    """Writes train and validation files and gives the data section that names them."""

    def make(train: str, validation: str | None = None, suffix: str = ".tsv", **settings: Any) -> DataConfig:
        paths = []
        for name, text in (("train", train), ("dev", train if validation is None else validation)):
            path = tmp_path / f"{name}{suffix}"
            path.write_bytes(text.encode())
            paths.append(str(path))
        return DataConfig(**{"task": "glue/sst2", "train": paths[0], "validation": paths[1], **settings})

    return make
