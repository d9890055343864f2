"""The tokenizer in a GGUF: what is in the file, and that one which llama.cpp would read otherwise is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers, pre_tokenizers

from leap_dist.errors import UserError
from leap_dist.export import gguf
from leap_dist.export.kinds import export_run
from leap_dist.export.shrunk import Models
from leap_dist.run_folder import read_run
from tests.export.runs import make_run
from tests.export.test_gguf import byte_tokenizer, language_model, read

pytestmark = pytest.mark.slow


def space_tokenizer(more: tuple[tuple[str, str], ...] = ()) -> Any:
    """BPE with a sign for a space and bytes for the unknown, as Gemma's and Llama 2's."""
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "▁", "a", "b", "c", "ab", "▁ab", "abc", "▁a"]
    words += [f"<0x{byte:02X}>" for byte in range(39)]
    merges = [("a", "b"), ("▁", "ab"), ("ab", "c"), *more]
    backend = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.chat_template = "{{ messages }}"
    return made


def test_words_on_bytes(tmp_path: Path) -> None:
    gguf.save_gguf(language_model("qwen2"), byte_tokenizer(), tmp_path / "model.gguf", "F32", "tiny")
    keys = read(tmp_path / "model.gguf")[0]
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", "qwen2")
    assert keys["tokenizer.ggml.merges"] == ["t h", "th e"]
    assert keys["tokenizer.ggml.tokens"][0] == "<|end|>" and keys["tokenizer.ggml.tokens"][-1] == "[PAD259]"
    assert keys["tokenizer.ggml.token_type"][:2] == [3, 1] and keys["tokenizer.ggml.token_type"][-1] == 5
    assert keys["tokenizer.ggml.eos_token_id"] == 0 and keys["tokenizer.ggml.add_bos_token"] is False


def test_words_with_a_sign_for_space(tmp_path: Path) -> None:
    model = language_model("llama", vocab_size=48)
    (note,) = gguf.save_gguf(model, space_tokenizer(), tmp_path / "model.gguf", "F32", "tiny")
    keys = read(tmp_path / "model.gguf")[0]
    assert note == "2 words of the tokenizer that the model has no row for are left out."
    assert keys["tokenizer.ggml.model"] == "llama" and len(keys["tokenizer.ggml.tokens"]) == 48
    assert keys["tokenizer.ggml.scores"][7:10] == [0.0, -1.0, -2.0] and keys["tokenizer.ggml.scores"][4] == -3.0
    assert keys["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 1] and keys["tokenizer.ggml.token_type"][11] == 6
    assert keys["tokenizer.ggml.add_bos_token"] is True and keys["tokenizer.ggml.add_space_prefix"] is False
    assert keys["tokenizer.chat_template"] == "{{ messages }}"


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def split_otherwise() -> Any:
    tokenizer = byte_tokenizer()
    steps = [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return tokenizer


def changed(tokenizer: Any, **parts: Any) -> Any:
    """The tokenizer with other steps, or with affixes of its BPE's words."""
    backend = tokenizer.backend_tokenizer
    for name, value in parts.items():
        setattr(backend if hasattr(backend, name) else backend.model, name, value)
    return tokenizer


LOWER, REPLACE, PREPEND = normalizers.Lowercase(), normalizers.Replace(" ", "▁"), normalizers.Prepend("▁")


@pytest.mark.parametrize(
    ("tokenizer", "kind"),
    [
        (lambda: changed(byte_tokenizer(), normalizer=normalizers.NFC()), "gpt2"),
        (lambda: changed(space_tokenizer(), normalizer=normalizers.Sequence([PREPEND, REPLACE])), "llama"),
        (lambda: changed(space_tokenizer(), normalizer=None, pre_tokenizer=pre_tokenizers.Metaspace()), "llama"),
        (lambda: changed(space_tokenizer(), pre_tokenizer=pre_tokenizers.Split(" ", "merged_with_previous")), "llama"),
        (lambda: changed(space_tokenizer(), pre_tokenizer=pre_tokenizers.Split("▁", "merged_with_next")), "llama"),
    ],
)
def test_steps_that_llama_cpp_takes_too(tokenizer: Any, kind: str, tmp_path: Path) -> None:
    gguf.save_gguf(language_model("llama"), tokenizer(), tmp_path / "model.gguf", "F32", "tiny")
    assert read(tmp_path / "model.gguf")[0]["tokenizer.ggml.model"] == kind


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (word_tokenizer, "the tokenizer is WordLevel; allowed: BPE"),
        (split_otherwise, r"the tokenizer splits texts by .*Digits.* none of those that are written: llama-bpe, qwen2"),
        (lambda: space_tokenizer((("▁a", "b"),)), "pairs are not in the order of the words that they make"),
        (
            lambda: changed(byte_tokenizer(), normalizer=LOWER),
            'the tokenizer has {"type": "Lowercase"}, which llama.cpp does not do; allowed: NFC, or no normalizer',
        ),
        (
            lambda: changed(space_tokenizer(), normalizer=normalizers.Sequence([LOWER, REPLACE])),
            'has {"type": "Lowercase"}, which llama.cpp does not do; allowed: "▁" put for a space, and splits there',
        ),
        (
            lambda: changed(space_tokenizer(), pre_tokenizer=pre_tokenizers.Split("b", "isolated")),
            'has {"type": "Split", "pattern": {"String": "b"}, .*}, which llama.cpp does not do',
        ),
        (lambda: changed(space_tokenizer(), normalizer=PREPEND), 'has {"normalizer": {"type": "Prepend", .*}}, which'),
        *(
            (lambda affix=affix: changed(byte_tokenizer(), **{affix: "##"}), f'has {{"{affix}": "##"}}, which llama')
            for affix in ("continuing_subword_prefix", "end_of_word_suffix")
        ),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(
    tokenizer: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        gguf.save_gguf(language_model("llama"), tokenizer(), tmp_path / "model.gguf", "F32", "tiny")


def test_it_is_refused_by_the_kind_that_was_asked_for_before_the_model_is_shrunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Models, "shrunk", property(lambda self: pytest.fail("shrunk first")))
    folder = make_run(tmp_path / "run", language_model("llama"), {})
    changed(byte_tokenizer(), normalizer=LOWER).save_pretrained(folder / "model")
    with pytest.raises(
        UserError, match=r"^--to gguf_q8_0: the tokenizer has .*Lowercase.*; leave gguf_q8_0 out of --to"
    ):
        list(export_run(read_run(folder), ["mask", "gguf_q8_0"], tmp_path / "out", threads=1))
    assert not (tmp_path / "out").exists()
