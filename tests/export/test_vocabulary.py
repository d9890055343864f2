"""--vocabulary: the tokens that texts use alone, for every kind of tokenizer, with the same tokens and logits."""

from __future__ import annotations

import json
import random
import re
import string
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from leap_dist.errors import UserError
from leap_dist.export.hf import load_exported
from leap_dist.export.kinds import export_run
from leap_dist.export.vocabulary import Vocabulary, Wanted, cut_vocabulary
from leap_dist.models.pruned_folder import load_pruned
from leap_dist.run_folder import read_run_or_model
from tests.export.runs import classifier, make_run, structure_masks


def sentences(number: int) -> list[str]:
    """Sentences of made-up words, of which few are frequent, as in a language; the same every time."""
    chance = random.Random(0)
    syllables = [first + vowel for first in ("", *"bdfgklmnprstv", "st", "th", "é") for vowel in "aeiou"]
    words = ["".join(chance.choices(syllables, k=chance.randint(1, 4))) for _ in range(3000)]
    weights = [place**-1.5 for place in range(1, len(words) + 1)]
    found = []
    for line in range(number):
        text = " ".join(chance.choices(words, weights, k=chance.randint(2, 9)))
        found.append(f"{text.capitalize()}, {line * line}: ({words[line % 40]})." if line % 5 == 0 else text)
    return found


LINES = [*sentences(4000), string.printable[:-5]]
TRAINED, USED = "\n".join(LINES), "\n".join(LINES[:400])
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}


def around(tokenizer: Tokenizer, before: str, after: str = "") -> None:
    """Every text begins with a token, and may end with one."""
    pairs = [(token, tokenizer.token_to_id(token)) for token in (before, after) if token]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{before} $A {after}".strip(), pair=f"{before} $A $B:1 {after}".strip(), special_tokens=pairs
    )


def word_pieces() -> tuple[Tokenizer, dict[str, str]]:
    """As BERT's."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", *(f"[unused{place}]" for place in range(9)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator([TRAINED], trainers.WordPieceTrainer(vocab_size=900, special_tokens=special))
    made.decoder = decoders.WordPiece()
    around(made, "[CLS]", "[SEP]")
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return made, names


def byte_level(beginning: str = "<|end|>") -> tuple[Tokenizer, dict[str, str]]:
    """As GPT-2's: symbols are bytes, and the special token comes last."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([TRAINED], trainers.BpeTrainer(vocab_size=800, initial_alphabet=alphabet))
    made.add_special_tokens([beginning])
    return made, {"bos": beginning, "eos": beginning}


def roberta() -> tuple[Tokenizer, dict[str, str]]:
    """As GPT-2's, with a padding token behind some that no text uses."""
    plain, _ = byte_level()
    spec = json.loads(plain.to_str())
    names = ["<s>", "<spare>", "<pad>", "</s>", "<unk>", "<mask>"]
    spec["model"]["vocab"] = {word: place for place, word in enumerate([*names, *spec["model"]["vocab"]])}
    spec["added_tokens"] = []
    made = Tokenizer.from_str(json.dumps(spec))
    made.add_special_tokens([name for name in names if name != "<spare>"])
    made.post_processor = processors.RobertaProcessing(("</s>", 3), ("<s>", 0))
    return made, {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"}


def byte_fallback() -> tuple[Tokenizer, dict[str, str]]:
    """As Gemma's: no words, bytes for what is unknown, every split of a token a merge, free tokens for special uses."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<unused{place}>" for place in range(20))]
    first = Tokenizer(models.BPE(unk_token="<unk>"))
    first.normalizer = normalizers.Replace(" ", "▁")
    first.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    first.train_from_iterator([TRAINED], trainers.BpeTrainer(vocab_size=900, special_tokens=special))
    spec = json.loads(first.to_str())
    vocab = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab += [word for word in spec["model"]["vocab"] if word not in special]
    words = set(vocab)
    merges = [
        [word[:cut], word[cut:]]
        for word in vocab[len(special) + 256 :]
        for cut in range(1, len(word))
        if word[:cut] in words and word[cut:] in words
    ]
    spec["model"] |= {"vocab": {word: place for place, word in enumerate(vocab)}, "merges": merges}
    spec["model"] |= {"byte_fallback": True, "fuse_unk": True}
    spec["pre_tokenizer"] = None
    spec["added_tokens"] = []
    made = Tokenizer.from_str(json.dumps(spec))
    made.add_special_tokens(special)
    around(made, "<bos>")
    return made, {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>", "unk": "<unk>"}


def unigram() -> tuple[Tokenizer, dict[str, str]]:
    """As T5's."""
    made = Tokenizer(models.Unigram())
    made.normalizer, made.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=900, special_tokens=special, unk_token="<unk>")
    made.train_from_iterator(TRAINED.splitlines(), trainer)
    made.add_special_tokens([f"<extra_id_{place}>" for place in range(4)])
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return made, {"eos": "</s>", "pad": "<pad>", "unk": "<unk>"}


TOKENIZERS = {"bert": word_pieces, "gpt2": byte_level, "roberta": roberta, "llama": byte_fallback, "t5": unigram}
"""By the architecture of the model that comes with it."""
HEADS = {"bert": "MaskedLM", "roberta": "MaskedLM", "t5": "Seq2SeqLM"}


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    made, names = TOKENIZERS[kind]()
    return PreTrainedTokenizerFast(tokenizer_object=made, **{f"{name}_token": token for name, token in names.items()})


def make_model(folder: Path, kind: str, more_rows: int = 0, **settings: Any) -> Path:
    """A model with random weights, biases too, and its tokenizer."""
    import transformers

    tokenizer = tokenizer_of(kind)
    sizes = SIZES | {"max_position_embeddings": 64, "vocab_size": len(tokenizer) + more_rows}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    if kind == "t5":
        sizes = {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": sizes["vocab_size"],
        }
        ids["decoder_start_token_id"] = tokenizer.pad_token_id
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes | ids | settings)
    head = HEADS.get(kind, "CausalLM")
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def text(folder: Path, content: str = USED, name: str = "text.txt") -> Path:
    path = folder / name
    path.write_text(content, "utf-8")
    return path


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    inputs = {"input_ids": torch.tensor([ids[:60]])}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        result: torch.Tensor = model(**inputs).logits
    return result


def check_same(source: Path, folder: Path, texts: list[str]) -> int:
    """Tokens and logits of texts whose tokens all stayed; how many there were."""
    before, after = (AutoTokenizer.from_pretrained(place) for place in (source, folder))
    numbers = before.get_vocab()
    old = [numbers[after.convert_ids_to_tokens(place)] for place in range(len(after))]
    whole, cut, same = load_exported(source), load_exported(folder), 0
    assert cut.get_input_embeddings().weight.shape[0] == len(after) == cut.config.get_text_config().vocab_size
    for content in texts:
        expected, received = before(content)["input_ids"], after(content)["input_ids"]
        if set(expected) <= set(old):
            assert [old[number] for number in received] == expected, content
            if expected and same % 50 == 0:
                torch.testing.assert_close(logits(cut, received), logits(whole, expected)[..., old], atol=1e-5, rtol=0)
            same += 1
    return same


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_text_of_kept_tokens_has_the_same_tokens_and_logits(kind: str, tmp_path: Path) -> None:
    source, folder = make_model(tmp_path / "model", kind), tmp_path / "cut"
    found = cut_vocabulary(source, folder, Wanted([text(tmp_path)]))
    assert found.after < 0.9 * found.before and found.not_kept == 0
    assert found.after == found.used + found.special + found.bytes + found.passed
    others = [line for line in TRAINED.splitlines() if line not in USED]
    assert check_same(source, folder, [USED, *USED.splitlines()]) == 1 + len(USED.splitlines())
    assert check_same(source, folder, others) > 30
    after = AutoTokenizer.from_pretrained(folder)
    before = AutoTokenizer.from_pretrained(source)
    for name in ("bos", "eos", "pad", "unk", "mask"):
        assert getattr(after, f"{name}_token") == getattr(before, f"{name}_token")
        if hasattr(load_exported(folder).config, f"{name}_token_id"):
            expected = getattr(load_exported(source).config, f"{name}_token_id")
            assert getattr(load_exported(folder).config, f"{name}_token_id") == (
                expected and after.convert_tokens_to_ids(before.convert_ids_to_tokens(expected))
            )


@pytest.mark.parametrize("kind", ["gpt2", "roberta", "llama"])
def test_bytes_stay_and_spell_any_text(kind: str, tmp_path: Path) -> None:
    cut_vocabulary(make_model(tmp_path / "model", kind), tmp_path / "cut", Wanted([text(tmp_path, "some words")]))
    after = AutoTokenizer.from_pretrained(tmp_path / "cut")
    strange = "Ωμέγα 東京 🐑 zebra\t\x07"
    ids = after(strange, add_special_tokens=False)["input_ids"]
    assert after.unk_token_id is None or after.unk_token_id not in ids
    spelt = after.decode(ids).replace("▁", " ") if kind == "llama" else after.decode(ids)
    assert kind == "llama" or spelt == strange
    assert len(after) < 300 and not any("unused" in word for word in after.get_vocab())


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_new_words_of_known_letters_are_not_unknown(kind: str, tmp_path: Path) -> None:
    cut_vocabulary(make_model(tmp_path / "model", kind), tmp_path / "cut", Wanted([text(tmp_path, "one two")]))
    after = AutoTokenizer.from_pretrained(tmp_path / "cut")
    assert after.unk_token_id not in after("Quixotic jackdaws (7 of them) vex!")["input_ids"]
    assert after.unk_token_id in after("🐑")["input_ids"]


def test_configs_name_the_new_numbers(tmp_path: Path) -> None:
    source, folder = make_model(tmp_path / "model", "gpt2"), tmp_path / "cut"
    end, rare = tokenizer_of("gpt2").eos_token_id, tokenizer_of("gpt2")("z")["input_ids"][0]
    generation = {"bos_token_id": end, "eos_token_id": [end, rare], "suppress_tokens": [end, 700], "max_length": 20}
    (source / "generation_config.json").write_text(json.dumps(generation), "utf-8")
    found = cut_vocabulary(source, folder, Wanted([text(tmp_path, "some words")]))
    after = AutoTokenizer.from_pretrained(folder)
    end = after.eos_token_id
    assert end == found.after - 1
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert (config["bos_token_id"], config["eos_token_id"], config["vocab_size"]) == (end, end, found.after)
    written = json.loads((folder / "generation_config.json").read_text("utf-8"))
    assert written["eos_token_id"] == [end, after.convert_tokens_to_ids("z")] and written["max_length"] == 20
    assert written["suppress_tokens"] == [end]


def test_the_most_frequent_tokens(tmp_path: Path) -> None:
    for kind in TOKENIZERS:
        source, folder = make_model(tmp_path / kind, kind), tmp_path / f"{kind} cut"
        found = cut_vocabulary(source, folder, Wanted([text(tmp_path)], size=320))
        assert 310 <= found.after <= 320 and 0 < found.not_kept < 0.6
        assert check_same(source, folder, TRAINED.splitlines()) > 20


def test_rows_without_a_token_are_gone_and_said(tmp_path: Path) -> None:
    for kind, settings in (("llama", {"tie_word_embeddings": True}), ("t5", {}), ("bert", {})):
        source, folder = make_model(tmp_path / kind, kind, more_rows=28, **settings), tmp_path / f"{kind} cut"
        found = cut_vocabulary(source, folder, Wanted([text(tmp_path)]))
        assert "28 rows of the embeddings that no token had are gone." in found.notes()
        assert check_same(source, folder, USED.splitlines()) == len(USED.splitlines())


def test_a_special_token_without_a_row_leaves(tmp_path: Path) -> None:
    """As Gemma 3's tokenizer has one for images, which its text models have not."""
    source = make_model(tmp_path / "model", "llama")
    tokenizer = AutoTokenizer.from_pretrained(source, extra_special_tokens={"image_token": "<image>"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(source)
    assert len(tokenizer) == load_exported(source).config.vocab_size + 1
    cut_vocabulary(source, tmp_path / "cut", Wanted([text(tmp_path)]))
    assert "<image>" not in AutoTokenizer.from_pretrained(tmp_path / "cut").get_vocab()


def test_tokens_of_a_chat_template_stay(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", "gpt2", more_rows=2)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["<think>", "<other>"])
    tokenizer.chat_template = "{{ '<think>' }}"
    tokenizer.save_pretrained(source)
    cut_vocabulary(source, tmp_path / "cut", Wanted([text(tmp_path)]))
    after = AutoTokenizer.from_pretrained(tmp_path / "cut")
    assert "<think>" in after.get_vocab() and "<other>" not in after.get_vocab()
    assert after.chat_template == tokenizer.chat_template


def test_a_pruned_run_with_fewer_tokens(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("bert")
    model = classifier(vocab_size=len(tokenizer), max_position_embeddings=64)
    run = make_run(tmp_path / "run", model, structure_masks(model), "head")
    tokenizer.save_pretrained(run / "model")
    rows = text(tmp_path, "sentence\tlabel\n" + "\n".join(f"{line}\t1" for line in USED.split("\n")), "rows.tsv")
    wanted = Wanted([rows], held_out=[text(tmp_path, TRAINED)])
    kinds = ["hf", "shrunk"]
    cards = {card.kind: card for card in export_run(read_run_or_model(run), kinds, tmp_path / "out", 1, False, wanted)}
    shrunk, hf = cards["shrunk"], cards["hf"]
    assert isinstance(shrunk.vocabulary, Vocabulary) and shrunk.parameters and hf.parameters
    assert (
        shrunk.vocabulary.before == len(tokenizer)
        and shrunk.row()["tokens"] == f"{len(tokenizer)} → {shrunk.vocabulary.after}"
    )
    gone = (len(tokenizer) - shrunk.vocabulary.after) * 32
    assert hf.parameters.before - hf.parameters.after == gone < shrunk.parameters.before - shrunk.parameters.after
    page = (tmp_path / "out" / "shrunk" / "README.md").read_text("utf-8")
    assert "Held out: text.txt takes" in page and "Pruned to a density of" in page
    after = AutoTokenizer.from_pretrained(tmp_path / "out" / "shrunk")
    line = USED.splitlines()[2]
    masked, small = load_exported(run / "model"), load_pruned(tmp_path / "out" / "shrunk")
    expected, received = (logits(m, t(line)["input_ids"]) for m, t in ((masked, tokenizer), (small, after)))
    torch.testing.assert_close(received, expected, atol=1e-5, rtol=0)
    assert not list(tmp_path.glob(".vocabulary*"))


def test_a_model_that_gives_no_numbers_is_refused(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", "bert")
    model = load_exported(source)
    with torch.no_grad():
        model.get_parameter("bert.embeddings.position_embeddings.weight")[6, 3] = (
            torch.nan
        )  # shorter texts have numbers
    model.save_pretrained(source)
    with pytest.raises(RuntimeError, match="with fewer tokens its logits differ by nan of the largest"):
        cut_vocabulary(source, tmp_path / "cut", Wanted([text(tmp_path)]))


def test_mistakes(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", "bert")
    tiny, good = make_model(tmp_path / "tiny", "bert"), text(tmp_path)
    model = classifier()
    model.save_pretrained(tiny)
    bare = tmp_path / "bare"
    model.save_pretrained(bare)
    (tmp_path / "python").mkdir()
    from transformers import ByT5Tokenizer

    model.save_pretrained(tmp_path / "python")
    ByT5Tokenizer().save_pretrained(tmp_path / "python")
    binary, blank = tmp_path / "weights.bin", text(tmp_path, " \n", "blank.txt")
    binary.write_bytes(b"\x80\x00\x01")
    for folder, wanted, message in (
        (source, Wanted([tmp_path / "no.txt"]), "--vocabulary: got .*no.txt; there is no such file"),
        (source, Wanted([blank]), "--vocabulary: .*blank.txt: no text in it"),
        (source, Wanted([binary]), "--vocabulary: .*weights.bin: not text: a zero byte"),
        (source, Wanted([good], held_out=[blank]), "--held-out: .*blank.txt: no text in it"),
        (source, Wanted([good], size=3), "--vocabulary-size: got 3; allowed: at least 5, the special tokens"),
        (bare, Wanted([good]), "bare: has no tokenizer, whose tokens --vocabulary could choose from"),
        (tmp_path / "python", Wanted([good]), "ByT5Tokenizer. is written in Python and has no tokenizer.json"),
        (tiny, Wanted([good]), "tokenizer and its model disagree: token '.*' has the id 40, and the model has 40 rows"),
    ):
        with pytest.raises(UserError, match=message):
            cut_vocabulary(folder, tmp_path / "cut", wanted)
    assert not (tmp_path / "cut").exists()
    with pytest.raises(UserError, match="--to mask: not of a model that no run pruned"):
        next(export_run(read_run_or_model(source), ["mask"], tmp_path / "out", 1, False))


def test_each_step_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, kept = make_model(tmp_path / "model", next(iter(TOKENIZERS))), text(tmp_path)
    cut_vocabulary(source, tmp_path / "cut", Wanted([kept], held_out=[kept]))
    said = re.findall("vocabulary: (.*)", capsys.readouterr().err)
    assert said[:5] == [
        "reading the texts",
        "reading the tokenizer",
        "counting the tokens of the texts",
        "reading the model",
        "choosing tokens",
    ]
    assert said[5].startswith("keeping ")
    assert said[6:] == [
        "comparing the tokens of the texts with those before",
        "comparing logits with those before",
        "counting the tokens of the held-out texts",
    ]
