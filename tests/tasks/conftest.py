"""Fixtures of the tasks' tests: a small tokenizer, and caches in a folder of the test's own."""

from __future__ import annotations

import json
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


@pytest.fixture
def texts(files: Callable[..., DataConfig]) -> Callable[..., DataConfig]:
    """The same of text to learn to write."""

    def make(train: str, validation: str | None = None, suffix: str = ".txt", **settings: Any) -> DataConfig:
        return files(train, validation, suffix, **{"task": "lm", "max_length": 8, **settings})

    return make


@pytest.fixture(scope="session")
def speaker() -> Any:
    """A byte-level tokenizer with the marks of the templates as tokens of their own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    marks = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|think|>", "<|end|>"]
    backend.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., DataConfig]:
    """Writes rows as JSON lines and gives the data section."""

    def make(found: list[dict[str, Any]], **settings: Any) -> DataConfig:
        file = tmp_path / "chat.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in found), "utf-8")
        again = tmp_path / "again.jsonl"
        again.write_text(file.read_text("utf-8"), "utf-8")
        return DataConfig(**{"task": "lm", "train": str(file), "validation": str(again), **settings})

    return make


@pytest.fixture
def decoder(tokenizer: Any) -> Any:
    """The same words for a decoder: <s> 13 starts a text, </s> 14 is its EOS and put nowhere."""
    return with_specials(tokenizer, "<s> $A", "<s>")


@pytest.fixture
def plain(tokenizer: Any) -> Any:
    """The same words, and a tokenizer that puts nothing around a text, as GPT-2's."""
    return with_specials(tokenizer, "$A")


def with_specials(tokenizer: Any, template: str, bos: str | None = None) -> Any:
    """A copy with <s> 13 and </s> 14, the latter EOS, and another frame."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["<s>", "</s>"])
    specials = [("<s>", 13)] if bos else []
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token="</s>", unk_token="[UNK]", pad_token="[PAD]"
    )
