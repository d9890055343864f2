"""The tokenizer in a GGUF: words, their kinds, and how llama.cpp has to join and to split.

Two kinds of BPE are written: with "▁" for a space and bytes for what is unknown (Llama 2, Mistral, Gemma), which
llama.cpp joins by a score of each word, and on bytes (Llama 3, Qwen), which it joins by a list of pairs after it has
split the text by rules that it knows by a name.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from leap_dist.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

_ENDING = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_START = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
SPLITS = {
    _START + r"|\p{N}{1,3}" + _ENDING: "llama-bpe",
    _START + r"|\p{N}" + _ENDING: "qwen2",
    None: "gpt-2",
}
"""llama.cpp's names of the expressions by which texts are split; None: that which ByteLevel itself has."""
JOINED_WHOLE = ("llama-bpe",)
"""Those under which llama.cpp takes a part that is a word as that word, before it joins any pairs."""
AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")
SPACES = (
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Metaspace", "replacement": "▁"},
    {"type": "Split", "pattern": {"String": " "}},  # finds none: they are "▁" by then
    {"type": "Split", "pattern": {"String": "▁"}, "behavior": "MergedWithNext"},
)
"""What may be done to a text before a tokenizer with "▁" joins it: llama.cpp does it too, or it changes no token."""


def check_words(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, Any], list[list[str]], str | None]:
    """Its tokenizer.json, its pairs, and llama.cpp's name of how it splits texts, as `_split` gives it.

    UserError for a tokenizer that llama.cpp would not split or join texts with as transformers does.
    """
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer {type(tokenizer).__name__} has no tokenizer.json")
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    if spec["model"]["type"] != "BPE":
        raise UserError(f"the tokenizer is {spec['model']['type']}; allowed: BPE")
    split = _split(spec)
    _check_steps(spec, on_bytes=split is not None)
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in spec["model"]["merges"]]
    if split is None:
        _check_order(merges)
    return spec, merges, split


def problem(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """What `check_words` has against a tokenizer; None if it is taken, or there is none."""
    try:
        if tokenizer is not None:
            check_words(tokenizer)
    except UserError as error:
        return str(error)
    return None


def add_words(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase | None, num_words: int) -> list[str]:
    """Write the tokenizer for a model of `num_words` words; returns what to know about it.

    UserError as `check_words`.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return ["Without a tokenizer, as the run had none: llama.cpp takes and gives token ids."]
    spec, merges, split = check_words(tokenizer)
    words, kinds = _words(tokenizer, spec, num_words)
    if split is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split)
        writer.add_token_merges([" ".join(pair) for pair in merges])
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(words, merges))
        writer.add_add_space_prefix(_starts_with_space(tokenizer))
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    _add_special(writer, tokenizer, num_words)
    beyond = max(tokenizer.get_vocab().values()) + 1 - num_words
    return [f"{beyond} words of the tokenizer that the model has no row for are left out."] if beyond > 0 else []


def _words(tokenizer: PreTrainedTokenizerBase, spec: dict[str, Any], num_words: int) -> tuple[list[str], list[int]]:
    """The text and the kind of every word; rows of the model without a word are unused."""
    from gguf import TokenType

    words, kinds = [f"[PAD{i}]" for i in range(num_words)], [int(TokenType.UNUSED)] * num_words
    added = {entry["id"]: entry for entry in spec["added_tokens"]}
    for word, number in tokenizer.get_vocab().items():
        if number >= num_words:
            continue
        words[number], kinds[number] = word, int(TokenType.NORMAL)
        if word == spec["model"]["unk_token"]:
            kinds[number] = int(TokenType.UNKNOWN)
        elif number in added and added[number]["special"]:
            kinds[number] = int(TokenType.CONTROL)
        elif spec["model"]["byte_fallback"] and re.fullmatch("<0x[0-9A-F]{2}>", word):
            kinds[number] = int(TokenType.BYTE)
        elif number in added:
            words[number], kinds[number] = word.replace("▁", " "), int(TokenType.USER_DEFINED)
    return words, kinds


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """What a normalizer or a pre-tokenizer does, one after another."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        inside = step["normalizers" if "normalizers" in step else "pretokenizers"]
        return [one for each in inside for one in _steps(each)]
    return [step]


def _check_steps(spec: dict[str, Any], on_bytes: bool) -> None:
    """UserError for what the tokenizer does to a text and llama.cpp does not, beside the splits that `_split` knows."""
    steps = _steps(spec["normalizer"])
    if on_bytes:
        wrong, allowed = [step for step in steps if step["type"] != "NFC"], "NFC, or no normalizer"
    else:
        steps += _steps(spec["pre_tokenizer"])
        wrong = [step for step in steps if not any(known.items() <= step.items() for known in SPACES)]
        allowed = '"▁" put for a space, and splits there'
        if not any(step["type"] in ("Replace", "Metaspace") for step in steps):
            wrong.append({"normalizer": spec["normalizer"]})  # leaves spaces as they are
    wrong += [{key: spec["model"][key]} for key in AFFIXES if spec["model"].get(key)]
    if wrong:
        step = json.dumps(wrong[0], ensure_ascii=False)[:200]
        raise UserError(f"the tokenizer has {step}, which llama.cpp does not do; allowed: {allowed}")


def _split(spec: dict[str, Any]) -> str | None:
    """llama.cpp's name of how a tokenizer on bytes splits texts; None for one with "▁" and byte_fallback."""
    steps = _steps(spec["pre_tokenizer"])
    on_bytes = [step for step in steps if step["type"] == "ByteLevel"]
    if not on_bytes:
        if not spec["model"]["byte_fallback"]:
            raise UserError("the tokenizer has neither bytes nor byte_fallback")
        return None
    patterns = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    pattern = None if on_bytes[0]["use_regex"] else "".join(map(str, patterns))
    known = SPLITS.get(pattern) if len(steps) == len(on_bytes) + (pattern is not None) else None
    whole = bool(spec["model"].get("ignore_merges"))
    if known is None or on_bytes[0]["add_prefix_space"] or whole != (known in JOINED_WHOLE):
        raise UserError(
            f"the tokenizer splits texts by {json.dumps(spec['pre_tokenizer'])[:200]}, which is none of "
            f"those that are written: {', '.join(SPLITS.values())}"
        )
    return known


def _first_pairs(merges: list[list[str]]) -> dict[str, int]:
    """Of each word that pairs make, the place of its first pair."""
    first: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        first.setdefault(left + right, rank)
    return first


def _check_order(merges: list[list[str]]) -> None:
    """UserError if pairs are not in the order of the words that they make: no scores give that order then."""
    first = _first_pairs(merges)
    ranks = [first[left + right] for left, right in merges]
    if ranks != sorted(ranks):
        raise UserError(
            "the tokenizer's pairs are not in the order of the words that they make, which llama.cpp "
            "needs of a tokenizer with byte_fallback"
        )


def _scores(words: list[str], merges: list[list[str]]) -> list[float]:
    """A score for every word: the later its first pair stands among the pairs, the lower."""
    first = _first_pairs(merges)
    return [-float(first.get(word, len(merges))) for word in words]


def _starts_with_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether "a" is tokenised as " a" is."""
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[0]
    return str(first).startswith("▁")


def _add_special(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, num_words: int) -> None:
    """The words with a role, what a text starts and ends with, and the chat template."""
    for role in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{role}_token_id")
        if number is not None and number < num_words:
            getattr(writer, f"add_{role}_token_id")(number)
    framed = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(framed[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(framed[-1:] == [tokenizer.eos_token_id])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
