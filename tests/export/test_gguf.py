"""GGUF: what is in the file, and that another reader of such files makes the same model and tokens of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from leap_dist.errors import UserError
from leap_dist.export import gguf, llama
from leap_dist.export.hf import without_weights
from leap_dist.export.kinds import export_run
from leap_dist.export.shrunk import Models
from leap_dist.models.shrink import shrink_
from leap_dist.run_folder import read_run
from tests.export.runs import classifier, make_run, structure_masks

pytestmark = pytest.mark.slow

IDS = torch.arange(1, 25).view(2, 12)
SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 128},  # transformers' reader knows no other
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 16},
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def language_model(kind: str, **settings: Any) -> Any:
    """Random weights, norms and biases that are not trivial."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | FAMILIES[kind] | settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    answer: torch.Tensor = model(input_ids=IDS).logits
    return answer


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys and the tensors of a file."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return keys, {tensor.name: tensor for tensor in reader.tensors}


def byte_tokenizer() -> Any:
    """BPE on bytes, split as Qwen's is, with 259 words."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from leap_dist.export.gguf_words import SPLITS

    split = next(pattern for pattern, name in SPLITS.items() if name == "qwen2")
    words = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [("t", "h"), ("th", "e")]))
    on_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    steps = [pre_tokenizers.Split(Regex(split), "isolated"), on_bytes]
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", bos_token=None)


def cut_(model: Any, layer: int, groups: list[int], neurons: int = 0) -> None:
    """Remove key/value heads with their queries, and the first neurons, of one layer."""
    attention, mlp = model.model.layers[layer].self_attn, model.model.layers[layer].mlp
    with torch.no_grad():
        for group in groups:
            attention.q_proj.weight[32 * group : 32 * (group + 1)] = 0.0
            attention.o_proj.weight[:, 32 * group : 32 * (group + 1)] = 0.0
            for part in (attention.k_proj, attention.v_proj):
                part.weight[16 * group : 16 * (group + 1)] = 0.0
        for part in (mlp.gate_proj, mlp.up_proj):
            part.weight[:neurons] = 0.0
        mlp.down_proj.weight[:, :neurons] = 0.0


@pytest.mark.parametrize("kind", FAMILIES)
def test_another_reader_finds_the_same_model(kind: str, tmp_path: Path) -> None:
    """transformers' own reader undoes what llama.cpp has another way: the order of rows, offsets of norms."""
    from transformers import AutoModelForCausalLM

    model = language_model(kind)
    assert gguf.save_gguf(model, byte_tokenizer(), tmp_path / "model.gguf", "F32", "tiny") == []
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    other = type(model)(model.config).eval()
    other.load_state_dict(found.state_dict())
    assert torch.allclose(logits(other), logits(model), atol=1e-5)
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    for key in (*keys, "vocab_size", "max_position_embeddings", "rms_norm_eps"):
        assert getattr(found.config, key) == pytest.approx(getattr(model.config, key)), key


def test_the_keys_of_gemma(tmp_path: Path) -> None:
    model = language_model("gemma3_text", layer_types=["full_attention", "sliding_attention"])
    _, note = gguf.save_gguf(model, None, tmp_path / "model.gguf", "F32", "tiny")
    assert "not those of every gemma3 (all but the last of each 6)" in note and "llama-cpp-python 0.3.36" in note
    keys, tensors = read(tmp_path / "model.gguf")
    assert keys["general.architecture"] == "gemma3" and keys["tokenizer.ggml.model"] == "none"
    assert keys["gemma3.attention.sliding_window"] == 8
    assert keys["gemma3.attention.sliding_window_pattern"] == [False, True]
    assert keys["gemma3.attention.key_length"] == keys["gemma3.attention.value_length"] == 16
    assert keys["gemma3.rope.freq_base"] == 1e6 and keys["gemma3.rope.freq_base_swa"] == 1e4
    norm = model.model.norm.weight.detach().numpy()
    assert np.array_equal(tensors["output_norm.weight"].data, norm + 1) and "output.weight" not in tensors


def test_llama_3_turns_slowly(tmp_path: Path) -> None:
    gguf.save_gguf(language_model("llama", rope_parameters=LLAMA3), None, tmp_path / "model.gguf", "F32", "tiny")
    factors = read(tmp_path / "model.gguf")[1]["rope_freqs.weight"].data
    assert factors[0] == pytest.approx(1.0) and factors[-1] == pytest.approx(8.0) and len(factors) == 8


def test_a_window_bounds_the_length(tmp_path: Path) -> None:
    """llama.cpp has no window for Mistral: up to the window's length it makes no difference."""
    gguf.save_gguf(language_model("mistral", sliding_window=8), None, tmp_path / "model.gguf", "F32", "tiny")
    assert read(tmp_path / "model.gguf")[0]["llama.context_length"] == 8


@pytest.mark.parametrize(
    ("layer", "groups", "neurons", "heads", "ffn"),
    [
        (0, [], 30, [4, 4, 4], [66, 96, 96]),
        (1, [0], 96, [4, 2, 4], [96, 1, 96]),
        (1, [0, 1], 96, [4, 0, 4], [96, 0, 96]),
    ],
)
def test_layers_of_many_widths(
    layer: int, groups: list[int], neurons: int, heads: list[int], ffn: list[int], tmp_path: Path
) -> None:
    model = language_model("llama", num_hidden_layers=3)
    cut_(model, layer, groups, neurons)
    shrink_(model)
    (note,) = gguf.save_gguf(model, byte_tokenizer(), tmp_path / "model.gguf", "F32", "tiny")
    keys, tensors = read(tmp_path / "model.gguf")
    assert 'written as "deci"' in note and keys["general.architecture"] == "deci"
    assert keys["deci.attention.head_count"] == heads and keys["deci.feed_forward_length"] == ffn
    assert keys["deci.attention.head_count_kv"] == [number // 2 for number in heads]
    for number, (queries, width) in enumerate(zip(heads, ffn, strict=True)):
        assert (f"blk.{number}.attn_norm.weight" in tensors) == (queries > 0)
        assert (f"blk.{number}.ffn_norm.weight" in tensors) == (width > 0)
        if width:
            assert tensors[f"blk.{number}.ffn_down.weight"].data.shape == (64, width)


def test_even_layers_that_lost_heads(tmp_path: Path) -> None:
    model = language_model("qwen3", head_dim=16)
    for layer in (0, 1):
        cut_(model, layer, [1], 32)
    shrink_(model)
    gguf.save_gguf(model, None, tmp_path / "model.gguf", "F32", "tiny")
    keys, tensors = read(tmp_path / "model.gguf")
    assert (keys["qwen3.attention.head_count"], keys["qwen3.feed_forward_length"]) == (2, 64)
    assert tensors["blk.1.attn_q.weight"].data.shape == (32, 64)


def test_types_of_matrices(tmp_path: Path) -> None:
    from gguf import dequantize

    model = language_model("llama", intermediate_size=90)
    weight = model.model.layers[0].self_attn.v_proj.weight.detach().numpy()
    for kind, tolerance in (("F32", 0.0), ("F16", 1e-3), ("BF16", 1e-2), ("Q8_0", 1e-2)):
        gguf.save_gguf(model, None, tmp_path / f"{kind}.gguf", kind, "tiny")
        tensors = read(tmp_path / f"{kind}.gguf")[1]
        found = tensors["blk.0.attn_v.weight"]
        assert found.tensor_type.name == kind and tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
        assert np.abs(dequantize(found.data, found.tensor_type) - weight).max() <= tolerance * np.abs(weight).max()
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "F16"  # 90 is not a multiple of 32


# ------------------------------------------------------------------------------ refused


def uneven(kind: str) -> Any:
    model = language_model(kind)
    cut_(model, 1, [], 30)
    shrink_(model)
    return model


def without_first_heads() -> Any:
    model = language_model("llama")
    cut_(model, 0, [0, 1])
    shrink_(model)
    return model


def qwen2_without_heads() -> Any:
    model = language_model("qwen2")
    for layer in model.model.layers:
        attention = layer.self_attn
        for part, rows in ((attention.q_proj, 32), (attention.k_proj, 16), (attention.v_proj, 16)):
            part.bias.data[rows:] = 0.0
    for layer in (0, 1):
        cut_(model, layer, [1])
    shrink_(model)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: uneven("qwen3"), 'takes a qwen3 with one width for all: prune with "uniform": true in every gate'),
        (without_first_heads, "the first layer lost all its heads"),
        (qwen2_without_heads, "takes a qwen2 with 64 rows of queries, and 32 are left: keep its heads"),
        (
            lambda: language_model("llama", hidden_act="gelu"),
            "the activation is gelu, and llama.cpp computes with silu",
        ),
        (
            lambda: language_model("gemma3_text", query_pre_attn_scalar=64),
            "the scale of attention is 0.125, .* with 0.25",
        ),
        (
            lambda: language_model("gemma2", final_logit_softcapping=None),
            "final_logit_softcapping is False, .* with True",
        ),
        (lambda: language_model("llama", rope_parameters=LLAMA3 | {"rope_type": "dynamic"}), "rope_type is dynamic"),
        (
            lambda: language_model("gemma2", layer_types=["full_attention"] * 2),
            "no layer has a sliding window, .* gemma2",
        ),
        (
            lambda: language_model("gemma3_text", layer_types=["full_attention"] * 2),
            "no layer has a sliding window, .* gemma3: keep one",
        ),
        (lambda: classifier("llama"), "LlamaForSequenceClassification is not among the language models"),
        *(
            (
                lambda kind=kind: language_model(kind, attention_bias=True),
                "the bias of attention's output is True",
            )
            for kind in ("qwen3", "gemma2", "gemma3_text")
        ),
    ],
)
def test_what_llama_cpp_would_not_compute_is_refused(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        gguf.save_gguf(make(), None, tmp_path / "model.gguf", "F32", "tiny")
    assert not list(tmp_path.iterdir())


def test_an_export_with_its_card(tmp_path: Path) -> None:
    model = language_model("llama", max_position_embeddings=512)
    neuron = torch.arange(96) >= 32
    masks = {
        f"model.layers.{i}.mlp.{part}_proj.weight": neuron[:, None].expand(96, 64).clone()
        for i in (0, 1)
        for part in ("gate", "up")
    }
    folder = make_run(tmp_path / "run", model, masks, "neuron")
    byte_tokenizer().save_pretrained(folder / "model")
    (tmp_path / "text.txt").write_text("the other weather " * 60)
    data = {"task": "lm", "max_length": 400, **dict.fromkeys(("train", "validation"), str(tmp_path / "text.txt"))}
    (folder / "config.json").write_text(json.dumps({"leap": {}, "model": {}, "data": data}))
    run = read_run(folder)
    if not llama.is_here():
        with pytest.raises(UserError, match="--to gguf_q4_k_m: llama-cpp-python not installed; install with"):
            list(export_run(run, ["gguf", "gguf_q4_k_m"], tmp_path / "out", threads=1))
        assert not (tmp_path / "out").exists()
    wanted = ["gguf", "gguf_q8_0", *["gguf_q4_k_m"] * llama.is_here()]
    full, small, *smaller = export_run(run, wanted, tmp_path / "out", threads=1)
    assert "matrices in F32, as the run saved them." in full.notes[0] and small.bytes.after < full.bytes.after / 3
    for card in (full, small, *smaller):
        assert "library_name: gguf" in card.page() and bool(card.latency) == llama.is_here()
        assert (llama.NOT_HERE in card.notes) != llama.is_here()
        assert any("perplexity" in note for note in card.notes) == llama.is_here()
    assert all(card.bytes.after <= small.bytes.after for card in smaller)
    assert read(tmp_path / "out" / "gguf" / "model.gguf")[0]["llama.feed_forward_length"] == 64


def test_a_refusal_leaves_nothing_and_comes_before_the_model_is_shrunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Models, "stock", property(lambda self: pytest.fail("shrunk first")))
    model = classifier()
    run = read_run(make_run(tmp_path / "run", model, structure_masks(model), "head"))
    with pytest.raises(UserError, match="--to gguf: BertForSequenceClassification is not among the language models"):
        list(export_run(run, ["hf", "gguf"], tmp_path / "out", threads=1))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["mask", "gguf_q8_0", "hf"], "--to gguf_q8_0: {}; leave gguf_q8_0 out of --to, or take another kind"),
        (["gguf", "gguf_q8_0"], "--to gguf, gguf_q8_0: {}; leave gguf, gguf_q8_0 out of --to, or take another kind"),
    ],
)
def test_what_the_config_decides_is_refused_before_a_weight_is_loaded(
    wanted: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Models, "masked", property(lambda self: pytest.fail("loaded first")))
    model = language_model("gemma3_text", query_pre_attn_scalar=64)
    run = read_run(make_run(tmp_path / "run", model, {}))
    with pytest.raises(UserError) as caught:
        list(export_run(run, wanted, tmp_path / "out", threads=1))
    wrong = "the scale of attention is 0.125, and llama.cpp computes with 0.25"
    assert str(caught.value) == f"{message.format(wrong)}, such as hf" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_the_config_decides_is_the_same_without_weights(kind: str, tmp_path: Path) -> None:
    language_model(kind).save_pretrained(tmp_path)
    assert gguf.problem_of_config(without_weights(tmp_path)) is None


def test_missing_packages_are_installed_from_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((gguf, "gguf"), (llama, "llama")):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=rf'not installed; install with pip install -e "\.\[{name}\]"'):
            module.require_library("--to x")
