"""Texts that are refused, in words, and those that are not."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from leap_dist.config.sections import DataConfig
from leap_dist.errors import UserError
from leap_dist.tasks import load_task
from leap_dist.tasks.texts import texts_in
from tests.tasks.test_lm import WORDS


@pytest.mark.parametrize(
    ("settings", "train", "message"),
    [
        ({}, " \n\n", r"data\.train: .*train\.txt: no text in it"),
        ({}, "a b c", r"data\.train: .*: got 4 tokens; allowed: at least 7 \(a block of data\.max_length\)"),
        ({"text": ("a", "b"), "task": "mlm"}, WORDS, r"data\.text: got a, b; allowed: one column for mlm"),
        ({"suffix": ".csv"}, "body\na", r'data\.text: got "text", which is not a column of .*; allowed: body'),
    ],
)
def test_refused(texts: Any, tokenizer: Any, settings: dict[str, Any], train: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_task(texts(train, **settings), tokenizer)


def test_too_little_to_judge(texts: Any, plain: Any) -> None:
    plain.eos_token = None
    with pytest.raises(UserError, match=r"data\.validation: .*: got 1 tokens; allowed: at least 2"):
        load_task(texts(WORDS, "a"), plain)


def test_nothing_named(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"data\.train: missing; lm needs local files .*, or data\.dataset"):
        load_task(DataConfig(task="lm"), tokenizer)


def test_no_mask_token(texts: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tokenizer._special_tokens_map, "mask_token", None)
    with pytest.raises(UserError, match=r'data\.task: got "mlm"; the tokenizer has no mask token'):
        load_task(texts(WORDS, task="mlm"), tokenizer)


@pytest.mark.parametrize(
    ("suffix", "text", "message"),
    [
        (
            ".xml",
            WORDS,
            r"got .*train\.xml; allowed: text in a file that ends in \.txt, .* or has no ending, rows in one",
        ),
        (".log.gz", WORDS, r"got .*train\.log\.gz; allowed: text in .*\.ndjson, .*packed or not; rename it by what it"),
        (
            ".txt",
            '{"text": "a b c d"}\n{"text": "good"}\n',
            r"train\.txt: begins with a JSON object, and its name says",
        ),
        ("", '\n {\n  "text": "a b c d"\n}\n', r"train: begins with a JSON object, .*; allowed: rows in a file that"),
        (".md", '[{"text": "a b c d"}]', r"train\.md: begins with a JSON object, .* ends in \.jsonl \(one object a li"),
        (".txt.gz", '{"text": "a"}{"text": "b"}', r"train\.txt\.gz: begins with a JSON object"),
    ],
)
def test_rows_that_would_be_learned_as_text(texts: Any, tokenizer: Any, suffix: str, text: str, message: str) -> None:
    data = texts(text, suffix=suffix)
    for name in (*data.train, *data.validation):
        if name.endswith(".gz"):
            Path(name).write_bytes(gzip.compress(text.encode()))
    for task in ("lm", "mlm"):
        with pytest.raises(UserError, match=rf"^data\.train: .*{message}"):
            load_task(data.model_copy(update={"task": task}), tokenizer)
    with pytest.raises(UserError, match=rf"^--vocabulary: .*{message}"):
        texts_in("--vocabulary", Path(data.train[0]))


def test_half_a_character_in_a_text_whose_words_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"a": [{"b": "good"}, "x\ud800"]}))
    with pytest.raises(
        UserError, match=r"a\.jsonl: line 1: .ud800 at character 2 is half of a surrogate pair, not text"
    ):
        texts_in("--vocabulary", tmp_path / "a.jsonl")


@pytest.mark.parametrize("suffix", [".txt", ".md", ".raw", ".tokens", ""])
@pytest.mark.parametrize("start", ["", "{", "[1] ", "{} ", '{"a": 1} is ', "{{ a }}\n"])
def test_text_that_is_no_json(texts: Any, decoder: Any, suffix: str, start: str) -> None:
    assert len(load_task(texts(start + WORDS, suffix=suffix), decoder).train)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_text_without_a_word_that_can_be_left_out(texts: Any, tokenizer: Any, split: str) -> None:
    unknown = "x y z " * 9
    data = texts(unknown, WORDS, task="mlm") if split == "train" else texts(WORDS, unknown, task="mlm")
    with pytest.raises(
        UserError,
        match=rf"^data\.{split}: .*: got no word that can be left out, as the tokenizer knows none of them; al",
    ):
        load_task(data, tokenizer)


@pytest.mark.parametrize(
    ("suffix", "settings", "message"),
    [
        (".json", {}, r"data\.train: .*train\.json: cannot be read: Extra data.*; one object a line is \.jsonl"),
        (".txt", {"text": "words"}, r"data\.text: got words, but .*train\.txt is plain text and has no columns"),
    ],
)
def test_a_file_that_would_be_read_as_another_kind(
    texts: Any, tokenizer: Any, suffix: str, settings: dict[str, str], message: str
) -> None:
    """JSON would be learned with its brackets; a column of plain text would have no effect."""
    with pytest.raises(UserError, match=message):
        load_task(texts('{"text": "a b c d"}' * 20, suffix=suffix, **settings), tokenizer)
