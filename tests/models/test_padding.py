"""Batches, model and export pad with one token: what a classifier says of a text does not depend on its neighbours."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from leap_dist.config.sections import DataConfig, ModelConfig
from leap_dist.errors import UserError
from leap_dist.export.hf import save_model
from leap_dist.models.load import load_model, load_tokenizer
from leap_dist.tasks import load_task
from leap_dist.tasks.base import Collator, Task, TokenTable, flat
from tests.models.test_load import make_task
from tests.models.tiny import SETTINGS
from tests.tasks.conftest import cache_folder, tokenizer

__all__ = ["cache_folder", "tokenizer"]

pytestmark = pytest.mark.slow

PAD = 7
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODERS = (
    "gemma2",
    "gemma3_text",
    "gpt2",
    "llama",
    "mistral",
    "mixtral",
    "opt",
    "phi3",
    "qwen2",
    "qwen3",
)
LAST_TOKEN: dict[str, dict[str, Any]] = {kind: SETTINGS[kind] for kind in DECODERS} | {
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "ctrl": {"vocab_size": 64, "n_embd": 32, "dff": 24, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "falcon": SIZES,
    "gpt_neo": SIZES
    | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 32},
    "gpt_neox": SIZES | {"intermediate_size": 24, "max_position_embeddings": 32},
    "gptj": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "rotary_dim": 8},
    "openai-gpt": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "stablelm": SIZES | {"intermediate_size": 24, "num_key_value_heads": 4},
    "starcoder2": SIZES | {"intermediate_size": 24, "num_key_value_heads": 2},
    "bart": {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 32}
    | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24},
    "xlnet": {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 24},
}
"""Classifiers that answer at the last token, or at the one that ends the text (2)."""
EXAMPLES = [{"input_ids": [*ids, 2], "attention_mask": [1] * (len(ids) + 1)} for ids in ([9, 10], [11, 3, 12, 13, 14])]


def text_task(pad: int = PAD, examples: Any = EXAMPLES, **changes: Any) -> Task:
    table = TokenTable(flat({key: [row[key] for row in examples] for key in examples[0]}))
    task = dataclasses.replace(make_task(), pad_id=pad, train=table, collate=Collator(pad, {}), vocab_size=64)
    return dataclasses.replace(task, max_length=table.longest, **changes)


@pytest.mark.parametrize("said", [3, -1, None], ids=["another", "minus one", "none"])
@pytest.mark.parametrize("kind", LAST_TOKEN)
def test_a_batch_says_what_each_text_says_alone(kind: str, said: int | None) -> None:
    torch.manual_seed(0)
    ends = {"eos_token_id": 2, "pad_token_id": said}
    task = text_task()
    model = load_model(ModelConfig(from_config={"model_type": kind, **LAST_TOKEN[kind], **ends}), task).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))  # what is asked differs from place to place
        together = model(**task.collate(EXAMPLES)).logits
        alone = torch.cat([model(**task.collate([example])).logits for example in EXAMPLES])
    assert torch.allclose(together, alone, atol=1e-5)
    assert model.config.pad_token_id == PAD


MIXING: dict[str, dict[str, Any]] = {
    "convbert": SIZES | {"intermediate_size": 24, "embedding_size": 32, "max_position_embeddings": 32},
    "fnet": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 24},
    "nystromformer": SIZES | {"intermediate_size": 24, "initializer_range": 0.5},
}
"""Encoders that mix padding into every token, whatever mask they get."""


@pytest.mark.parametrize("kind", [*MIXING, "llama", "bert", "xlnet"])
def test_a_model_whose_answers_depend_on_padding_is_reported(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    settings = MIXING.get(kind) or LAST_TOKEN.get(kind) or SETTINGS[kind]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    model = load_model(ModelConfig(from_config={"model_type": kind, **settings}), text_task())
    found = [record.getMessage() for record in caplog.records if "padding changes what" in record.getMessage()]
    assert (len(found) == 1 and kind in found[0] and "eval_batch_size: 1" in found[0]) == (kind in MIXING), found
    torch.set_rng_state(state)  # looking draws no random number, which would change the run
    transformers.AutoModelForSequenceClassification.from_config(model.config)
    drawn = torch.get_rng_state()
    torch.set_rng_state(state)
    load_model(ModelConfig(from_config={"model_type": kind, **settings}), text_task())
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_model_that_counts_positions_from_padding_is_refused_with_another() -> None:
    roberta = {"model_type": "roberta", **SETTINGS["roberta"], "pad_token_id": 1}
    with pytest.raises(UserError, match=r"counts positions from config\.pad_token_id, which is 1, .* pads with 7"):
        load_model(ModelConfig(from_config=roberta), text_task())
    load_model(ModelConfig(from_config=roberta), text_task(1))


@pytest.mark.parametrize("task", ["lm", "mlm", "squad"])
def test_padding_of_every_task_of_text(task: str, tokenizer: Any, tmp_path: Path) -> None:
    """What is exported has positions by the one token, and a tokenizer that pads with the other."""
    article = {"paragraphs": [{"context": "a b", "qas": [{"id": "q", "question": "c"}]}]}
    article["paragraphs"][0]["qas"][0]["answers"] = [{"text": "a", "answer_start": 0}]
    for name in ("train", "dev"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"data": [article]}))
        (tmp_path / f"{name}.txt").write_text("a b c d " * 9)
    ending = "json" if task == "squad" else "txt"
    files = {"train": str(tmp_path / f"train.{ending}"), "validation": str(tmp_path / f"dev.{ending}")}
    loaded = load_task(DataConfig(task=task, max_length=32 if task == "squad" else 16, **files), tokenizer)
    roberta = {"model_type": "roberta", **SETTINGS["roberta"], "is_decoder": task == "lm"}
    with pytest.raises(UserError, match=r"counts positions from config\.pad_token_id, which is 1, .* pads with 0; all"):
        load_model(ModelConfig(from_config=roberta | {"pad_token_id": 1}), loaded)
    del roberta["pad_token_id"]
    assert load_model(ModelConfig(from_config=roberta), loaded).config.pad_token_id == 0


@pytest.mark.parametrize(("ids", "count"), [([9, 10], 0), ([9, 2, 2], 2)])
def test_a_classifier_that_answers_at_the_end_needs_one_in_every_text(ids: list[int], count: int) -> None:
    examples = [*EXAMPLES, {"input_ids": ids, "attention_mask": [1] * len(ids)}]
    config = {"model_type": "bart", **LAST_TOKEN["bart"], "eos_token_id": 2}
    with pytest.raises(UserError, match=rf"a bart classifier .* \(id 2\).*: example 3 of train has {count}, the f"):
        load_model(ModelConfig(from_config=config), text_task(examples=examples))


def tokenizer_folder(folder: Path, **special: str) -> str:
    words = {"[PAD]": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 12)}, "unused": 99}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")), **special)
    made.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("special", [{"eos_token": "</s>"}, {"pad_token": "[PAD]", "eos_token": "</s>"}])
def test_the_exported_folder_agrees_with_its_tokenizer(special: dict[str, str], tmp_path: Path) -> None:
    config = ModelConfig(from_config={"model_type": "llama", **SETTINGS["llama"], "pad_token_id": 5})
    tokenizer = load_tokenizer(config, tokenizer_folder(tmp_path / "t", **special))
    assert tokenizer.pad_token_id == (0 if "pad_token" in special else 2)
    model = load_model(config, text_task(int(tokenizer.pad_token_id)))
    save_model(model, list(model.named_parameters()), tmp_path / "out", tokenizer)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"]
    assert stored == AutoTokenizer.from_pretrained(tmp_path / "out").pad_token_id == tokenizer.pad_token_id


# ------------------------------------------------------------------------------ sizes


def test_a_tokenizer_may_have_entries_that_no_text_uses() -> None:
    config = {"model_type": "bert", **SETTINGS["bert"]}
    task = text_task(vocab_size=99)
    load_model(ModelConfig(from_config=config), task)
    too_high = [*EXAMPLES, {"input_ids": [64], "attention_mask": [1]}]
    with pytest.raises(UserError, match=r"model: vocab_size is 64; allowed: at least 65, tiny has 65 token ids"):
        load_model(ModelConfig(from_config=config), text_task(examples=too_high))
    with pytest.raises(UserError, match=r"vocab_size is 64; allowed: at least 99"):
        load_model(ModelConfig(from_config=config), text_task(pad=98))
    with pytest.raises(UserError, match=r"vocab_size is 64; allowed: at least 99"):  # masking puts in any of them
        load_model(ModelConfig(from_config=config), text_task(vocab_size=99, augment=lambda batch, _: batch))


def test_padding_on_the_left_mirrors_padding_on_the_right() -> None:
    collate = Collator(PAD, {})
    right = collate(EXAMPLES)
    collate.left = True
    left = collate(EXAMPLES)
    assert np.array_equal(left["input_ids"][0], [PAD] * 3 + [9, 10, 2])
    assert all(torch.equal(left[key][0], right[key][0].roll(3)) for key in right)
    assert all(torch.equal(left[key][1], right[key][1]) for key in right)


def test_relative_positions_take_any_length() -> None:
    """XLNet's config says -1 positions."""
    config = {"model_type": "xlnet", **LAST_TOKEN["xlnet"]}
    model = load_model(ModelConfig(from_config=config), dataclasses.replace(text_task(), max_length=5000))
    assert model.config.max_position_embeddings == -1
