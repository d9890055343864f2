"""Tokenised data on disk: made once, read again, made anew where anything that matters differs or is damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from leap_dist.tasks import cache
from leap_dist.tasks.cache import cached
from tests.disks import fill, free


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SMALLEST", 0)


def value(tokenizer: Any, *parts: object, number: int = 1) -> tuple[int, bool]:
    """(what comes back, whether it was made for this call)."""
    made: list[int] = []

    def make() -> dict[str, np.ndarray]:
        made.append(number)
        return {"ids": np.array([number], dtype=np.int32)}

    return int(cached(tokenizer, parts, make)["ids"][0]), bool(made)


def test_the_same_is_read_and_not_made(tokenizer: Any, cache_folder: Path) -> None:
    assert value(tokenizer, 128, "a") == (1, True)
    tokenizer("a", truncation=True, max_length=8)  # what it was last called with does not matter
    assert value(tokenizer, 128, "a", number=2) == (1, False)
    assert [file.suffix for file in cache_folder.iterdir()] == [".safetensors"]


def test_whatever_differs_is_made_anew(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    value(tokenizer, 128, "ab", "c")
    assert value(tokenizer, 128, "a", "bc", number=2) == (2, True)
    assert value(tokenizer, 64, "ab", "c", number=3) == (3, True)
    monkeypatch.setattr(tokenizer, "truncation_side", "left")
    assert value(tokenizer, 128, "ab", "c", number=4) == (4, True)


def test_another_vocabulary_is_another_tokenizer(tokenizer: Any) -> None:
    from transformers import PreTrainedTokenizerFast

    value(tokenizer, "a")
    text = tokenizer.backend_tokenizer.to_str().replace('"film"', '"films"')
    other = PreTrainedTokenizerFast(tokenizer_object=type(tokenizer.backend_tokenizer).from_str(text))
    assert value(other, "a", number=2) == (2, True)


def test_special_tokens_in_a_text(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands beside tokenizer.json decides whether "[SEP]" in a text is one token."""
    value(tokenizer, "a [SEP]")
    monkeypatch.setattr(tokenizer, "split_special_tokens", True)
    assert value(tokenizer, "a [SEP]", number=2) == (2, True)


def test_little_is_not_kept(tokenizer: Any, cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SMALLEST", 100)
    value(tokenizer, "a" * 90)
    assert not cache_folder.exists()


def test_a_damaged_file_is_replaced(tokenizer: Any, cache_folder: Path) -> None:
    value(tokenizer, "a")
    (file,) = cache_folder.iterdir()
    file.write_bytes(file.read_bytes()[:-2])
    assert value(tokenizer, "a", number=2) == (2, True)
    assert value(tokenizer, "a", number=3) == (2, False)


def test_where_nothing_can_be_written_nothing_is_kept(tokenizer: Any, cache_folder: Path) -> None:
    cache_folder.write_text("a file where the folder should be")
    assert value(tokenizer, "a") == (1, True)
    assert value(tokenizer, "a", number=2) == (2, True)


def test_a_full_disk_keeps_nothing_and_ends_nothing(
    tokenizer: Any, small_disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache, "cache_folder", lambda: small_disk / "tokens")
    (small_disk / "tokens").mkdir()
    fill(small_disk)
    assert value(tokenizer, "a") == (1, True)
    assert "tokenised data cannot be kept in" in caplog.text and not list((small_disk / "tokens").iterdir())
    free(small_disk)
    assert value(tokenizer, "a", number=2) == (2, True) and value(tokenizer, "a", number=3) == (2, False)
