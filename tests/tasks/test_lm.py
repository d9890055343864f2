"""Language models: blocks that lose no token, masks that chance decides and a seed repeats, perplexity by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from leap_dist.config.sections import DataConfig
from leap_dist.errors import UserError
from leap_dist.ops.words import IGNORED
from leap_dist.tasks import cache, documents, load_task
from leap_dist.tasks.documents import token_stream

WORDS = "a b c d good bad film plot"


# ------------------------------------------------------------------------------ blocks


def ids_of(examples: Any) -> list[list[int]]:
    return [example["input_ids"] for example in examples]


def test_blocks_start_as_a_text_does_and_a_file_ends_with_eos(texts: Any, decoder: Any) -> None:
    task = load_task(texts("\ufeffa b c d\n\ngood bad\nfilm\nplot a b", "a " * 15), decoder)
    assert ids_of(task.train) == [[13, 4, 5, 6, 7, 8, 9, 10]]  # the part block is dropped
    blocks = task.validation["validation"]
    assert ids_of(blocks) == [[13, *[4] * 7], [13, *[4] * 7], [13, 4, 14]]  # here it is not
    assert (task.problem, task.primary, task.max_length, task.vocab_size) == ("causal_lm", "perplexity", 8, 15)
    batch = task.collate([blocks[0], blocks[2]])
    assert batch["labels"][:, 1:].tolist() == [[4] * 7, [4, 14] + [IGNORED] * 5]
    assert batch["attention_mask"].tolist() == [[1] * 8, [1] * 3 + [0] * 5]
    assert task.collate(task.train[:])["labels"].tolist() == ids_of(task.train)


def test_a_tokenizer_that_starts_a_text_with_nothing(texts: Any, plain: Any) -> None:
    task = load_task(texts("a " * 16), plain)
    assert ids_of(task.train) == [[4] * 8] * 2
    assert ids_of(task.validation["validation"]) == [[4] * 8] * 2  # EOS alone has no token that predicts it


@pytest.mark.parametrize("kind", ["WordLevel", "BPE"])
def test_a_tokenizer_that_does_not_know_every_letter(texts: Any, kind: str) -> None:
    """Letters of DNA, and no token for what is unknown: <s> 4 starts a text, </s> 5 ends a document."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["A", "C", "G", "T", "<s>", "</s>"])}
    backend = Tokenizer(models.WordLevel(words) if kind == "WordLevel" else models.BPE(words, []))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 4)])
    letters = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    task = load_task(texts("ACGTTGCAA"), letters)
    assert ids_of(task.train) == [[4, 0, 1, 2, 3, 3, 2, 1]]
    assert ids_of(task.validation["validation"])[1] == [4, 0, 0, 5]
    if kind == "WordLevel":  # BPE leaves out what it has no token for
        unknown = (
            r'^data\.tokenizer: the tokenizer cannot take "ACNGT" \(.*\); allowed: one with a token for unknown words$'
        )
        with pytest.raises(UserError, match=unknown):
            load_task(texts("ACNGT"), letters)
    backend.post_processor = processors.TemplateProcessing(single="<s>", special_tokens=[("<s>", 4)])
    silent = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")
    with pytest.raises(
        UserError, match=r"data\.tokenizer: the post_processor of its tokenizer\.json leaves the text out"
    ):
        load_task(texts("ACGT"), silent)


def test_of_parquet_only_columns_that_are_used_are_read(tmp_path: Path, decoder: Any) -> None:
    """The other one has cells that Python cannot hold."""
    import pyarrow
    from pyarrow.parquet import write_table

    times = pyarrow.array([10**15, 0], pyarrow.timestamp("ms"))
    for column in ("text", "body"):
        write_table(pyarrow.table({"when": times, column: ["a b c d", "good bad"]}), file := tmp_path / "rows.parquet")
        own = {} if column == "text" else {"text": column}
        data = DataConfig(task="lm", train=str(file), validation=str(file), max_length=8, **own)
        assert ids_of(load_task(data, decoder).train) == [[13, 4, 5, 6, 7, 14, 8, 9]]


def test_rows_are_documents(texts: Any, tmp_path: Path, decoder: Any) -> None:
    rows = "\n".join(json.dumps({"body": text}) for text in ("a b c d", " ", "good bad\nfilm plot"))
    expected = [13, 4, 5, 6, 7, 14, 8, 9]
    assert ids_of(load_task(texts(rows, suffix=".jsonl", text="body"), decoder).train) == [expected]
    table = "body\na b c d\n\ngood bad film plot\n"
    assert ids_of(load_task(texts(table, suffix=".tsv", text="body"), decoder).train) == [expected]
    folder = tmp_path / "rows"
    folder.mkdir()
    for split in ("train", "validation"):
        lines = [json.dumps({"text": text}) for text in ("a b c d\n", "", "good bad film plot")]
        (folder / f"{split}.jsonl").write_text("\n".join(lines), "utf-8")
    task = load_task(DataConfig(task="lm", dataset=str(folder), max_length=8), decoder)
    assert ids_of(task.train) == [expected]
    assert ids_of(task.validation["validation"]) == [expected, [13, 10, 11, 14]]


def test_a_document_is_tokenised_as_a_whole(
    texts: Any, decoder: Any, monkeypatch: pytest.MonkeyPatch, cache_folder: Path
) -> None:
    """A tokenizer may join what stands on two lines; only a document that is too long is cut, at a line."""
    seen: list[list[str]] = []
    real = type(decoder).__call__

    def spy(self: Any, text: Any, **settings: Any) -> Any:
        seen.append(text if isinstance(text, list) else [text])
        return real(self, text, **settings)

    monkeypatch.setattr(type(decoder), "__call__", spy)
    texts_given = ["a b\nc\n" * 3, "good\n", "bad film\nplot"]
    whole = token_stream(texts_given, decoder, [14])
    assert seen == [texts_given]
    monkeypatch.setattr(documents, "TOKENIZE_CHARACTERS", 9)
    seen.clear()
    parts = token_stream(texts_given, decoder, [14])
    assert seen == [["a b\nc\n"], ["a b\nc\n"], ["a b\nc\n"], ["good\n"], ["bad film\n"], ["plot"]]
    assert parts["tokens"].tolist() == whole["tokens"].tolist()
    assert parts["bytes"].sum() == whole["bytes"].sum() == sum(map(len, texts_given))


def test_windows_judge_each_token_once(texts: Any, decoder: Any) -> None:
    """19 words and EOS, windows of 7 behind <s>, 3 new ones each."""
    words = (f"{WORDS} " * 3).split()[:19]
    task = load_task(texts(WORDS, " ".join(words), stride=3), decoder)
    stream = [decoder.convert_tokens_to_ids(word) for word in words] + [14]
    blocks = task.validation["validation"]
    assert ids_of(blocks) == [[13, *stream[start : start + 7]] for start in (0, 3, 6, 9, 12, 15)]
    judged = [[label for label in example["labels"][1:] if label != IGNORED] for example in blocks]
    assert judged == [stream[:7], *[stream[at : at + 3] for at in (7, 10, 13, 16)], stream[19:]]
    assert len(task.train) == 1  # training blocks do not overlap


def test_a_window_that_leaves_tokens_out(texts: Any, decoder: Any) -> None:
    with pytest.raises(UserError, match=r"data\.stride: got 8; allowed: at most 7, data\.max_length without the 1 spe"):
        load_task(texts(WORDS, stride=8), decoder)


def test_old_blocks_are_not_read_from_the_cache(texts: Any, decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SMALLEST", 0)
    data = texts(f"{WORDS} a")
    for _ in range(2):
        assert ids_of(load_task(data, decoder).validation["validation"])[1] == [13, 11, 4, 14]
    decoder.eos_token = "[SEP]"  # it stands beside the backend's file
    assert ids_of(load_task(data, decoder).validation["validation"])[1] == [13, 11, 4, 3]


# ------------------------------------------------------------------------------ bytes


def bytes_of(task: Any) -> list[int]:
    return [example["bytes"] for example in task.validation["validation"]]


def test_bytes_of_what_is_judged(texts: Any, decoder: Any, plain: Any) -> None:
    text = "a b  c\n\u00e9 good \U0001f600 film\n"
    assert sum(bytes_of(load_task(texts(WORDS, text), decoder))) == len(text.encode())
    assert sum(bytes_of(load_task(texts(WORDS, text, stride=2), decoder))) == len(text.encode())
    assert bytes_of(load_task(texts(WORDS, "a b c d a b c d a b c d a b c d"), plain)) == [14, 14]  # no first words


def test_bits_per_byte_by_hand(texts: Any, decoder: Any) -> None:
    """A model that knows nothing: log2(15) bits for every word and for EOS."""
    task = load_task(texts(WORDS, "good film a b c"), decoder)
    batch = task.collate(task.validation["validation"][:])
    values = scored(task, torch.zeros(1, 7, 15), batch)
    assert values["bits_per_byte"] == pytest.approx(6 * math.log2(15) / 15)
    assert values["perplexity"] == pytest.approx(15)


def test_a_tokenizer_that_does_not_say_where_tokens_lie(texts: Any) -> None:
    from transformers import ByT5Tokenizer

    task = load_task(texts("good film " * 3, "\u00e9t\u00e9", max_length=16), ByT5Tokenizer())
    assert bytes_of(task) == [5 - 1]  # ByT5 starts a text with nothing: its first byte is not judged
    assert task.validation["validation"][0]["input_ids"][-1] == 1  # </s>


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


def chances(seed: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(400 * seed + row) for row in range(400)]


def test_how_many_words_are_left_out_and_how(texts: Any, tokenizer: Any) -> None:
    task = load_task(texts(f"{WORDS} " * 20, task="mlm", max_length=64, mask_probability=0.3), tokenizer)
    batch = task.collate([task.train[0]] * 400)
    ids = batch["input_ids"]
    assert "labels" not in batch and task.augment is not None
    masked = task.augment(batch, chances(3))
    chosen = masked["labels"] != IGNORED
    assert torch.equal(masked["labels"][chosen], ids[chosen])
    assert torch.equal(masked["input_ids"][~chosen], ids[~chosen])
    assert not chosen[:, [0, -1]].any()  # special tokens
    assert chosen[:, 1:-1].float().mean().item() == pytest.approx(0.3, abs=0.01)
    new = masked["input_ids"][chosen]
    assert (new == 12).float().mean().item() == pytest.approx(0.8 + 0.1 / 13, abs=0.02)
    assert (new == ids[chosen]).float().mean().item() == pytest.approx(0.1 + 0.1 / 13, abs=0.02)
    same = task.augment(batch, chances(3))
    other = task.augment(batch, chances(4))
    assert torch.equal(same["input_ids"], masked["input_ids"]) and not torch.equal(other["labels"], masked["labels"])


# ------------------------------------------------------------------------------ perplexity


def scored(task: Any, logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    kept = task.evaluation.predict(lambda **_: SimpleNamespace(logits=logits), batch)
    return task.evaluation.score("validation", kept)


def test_perplexity_is_that_of_torchmetrics_over_all_tokens(texts: Any, tokenizer: Any) -> None:
    """Blocks of two lengths: a mean over blocks would give something else."""
    from torchmetrics.text import Perplexity

    task = load_task(texts(WORDS, f"{WORDS} a b"), tokenizer)
    batch = task.collate(task.validation["validation"][:])
    logits = torch.randn(2, 8, 13, generator=torch.Generator().manual_seed(0)) * 3
    metric = Perplexity(ignore_index=IGNORED)
    metric.update(logits[:, :-1], batch["labels"][:, 1:])
    values = scored(task, logits, batch)
    assert values["perplexity"] == pytest.approx(metric.compute().item(), rel=1e-5)
    assert values["loss"] == pytest.approx(math.log(values["perplexity"]))


def test_a_model_that_knows_nothing_and_one_that_knows_all(texts: Any, tokenizer: Any) -> None:
    task = load_task(texts(WORDS, "a b c d good bad"), tokenizer)
    batch = task.collate(task.validation["validation"][:])
    assert scored(task, torch.zeros(1, 8, 13), batch)["perplexity"] == pytest.approx(13)
    following = torch.nn.functional.one_hot(batch["input_ids"].roll(-1, 1), 13) * 50.0
    assert scored(task, following, batch) == pytest.approx(
        {"perplexity": 1.0, "bits_per_byte": 0.0, "accuracy": 1.0, "loss": 0.0}
    )


def test_masked_words_alone_are_judged(texts: Any, tokenizer: Any) -> None:
    task = load_task(texts(WORDS, task="mlm"), tokenizer)
    batch = task.collate(task.validation["validation"][:])
    right = batch["labels"].clamp(min=0)
    values = scored(task, torch.nn.functional.one_hot(right, 13) * 50.0, batch)
    assert values == pytest.approx({"perplexity": 1.0, "accuracy": 1.0, "loss": 0.0}, abs=1e-6)


# ------------------------------------------------------------------------------ real text


@pytest.mark.slow
def test_wikitext2_whole(data_dir: Path, tokenizer: Any, plain: Any) -> None:
    """Every word of the file is in a block."""
    file = data_dir / "wikitext2" / "wiki.test.raw.txt"
    if not file.is_file():
        pytest.skip(f"no {file}")
    backend = tokenizer.backend_tokenizer.pre_tokenizer
    words = len(backend.pre_tokenize_str(file.read_text("utf-8")))
    data = DataConfig(task="lm", train=str(file), validation=str(file), max_length=128)
    task = load_task(data, plain)
    assert sum(len(example["input_ids"]) for example in task.validation["validation"]) == words + 1  # EOS
    assert len(task.train) == (words + 1) // 128
