"""GGUF, the file that llama.cpp and what is built on it load: one file with weights, sizes and tokenizer.

Written through the gguf package from the shrunk model itself: sizes are read off its tensors, and what llama.cpp
derives from them (scales of attention and embeddings, tied words) is held against the model. Names and values are those
that llama.cpp's loaders of these architectures ask for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from leap_dist.errors import UserError
from leap_dist.export.gguf_words import add_words

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FILE = "model.gguf"
Q4_K_M = "Q4_K_M"
KINDS = {"gguf": None, "gguf_q8_0": "Q8_0", "gguf_q4_k_m": Q4_K_M}
"""The kinds of export, and the type of their matrices; None: as the run saved them."""
SAID = {
    None: "as the run saved them",
    "Q8_0": "a scale of 16 bits for every 32 weights of 8",
    Q4_K_M: "llama.cpp's mixture of 4 bits and 6, and of its other types for rows that are not a multiple of 256",
}
UNUSUAL = (
    "The layers with a sliding window are not those of every {} (all but the last of each {}), so the file lists them. "
    "llama.cpp reads that list since September 2026 (llama-cpp-python 0.3.36); an older one computes something else, "
    "and does not say so."
)
"""Of a model whose layers with a window are not those of its family's `period`."""
UNIFORM = (
    'prune with "uniform": true in every gate, which leaves all layers alike; heads too where the config has a key for '
    "their size, as Llama's has"
)


@dataclass(frozen=True)
class Family:
    """How llama.cpp takes an architecture of transformers.

    arch: its name there. permuted: rows of query and key are ordered in pairs, as rotary embeddings turn them.
    norm_offset: added to the weights of norms. activation: the one that is built in. uneven: the name under which
    layers may differ in width, if there is one. period: of so many layers the last has no sliding window.
    """

    arch: str
    activation: str = "silu"
    permuted: bool = False
    norm_offset: float = 0.0
    uneven: str | None = None
    period: int = 0


FAMILIES = {
    "llama": Family("llama", permuted=True, uneven="deci"),
    "mistral": Family("llama", permuted=True, uneven="deci"),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma2": Family("gemma2", "gelu_pytorch_tanh", norm_offset=1.0, period=2),
    "gemma3_text": Family("gemma3", "gelu_pytorch_tanh", norm_offset=1.0, period=6),
}


@dataclass(frozen=True)
class Widths:
    """Sizes by layer, read off the tensors."""

    heads: list[int]
    key_heads: list[int]
    neurons: list[int]

    @property
    def even(self) -> bool:
        """All layers alike, none without heads or neurons."""
        return all(len(set(values)) == 1 and values[0] > 0 for values in (self.heads, self.key_heads, self.neurons))


def require_library(what: str) -> None:
    """UserError if the gguf package is not installed; `what` is the flag that asks for it."""
    if find_spec("gguf") is None:
        raise UserError(f'{what}: gguf not installed; install with pip install -e ".[gguf]"')


def is_known(model: PreTrainedModel) -> bool:
    """Whether the model is a language model of one of the families."""
    return type(model).__name__.endswith("ForCausalLM") and model.config.get_text_config().model_type in FAMILIES


def unknown(model: PreTrainedModel) -> str | None:
    """What to say of a model that `is_known` does not know."""
    if is_known(model):
        return None
    return f"{type(model).__name__} is not among the language models written as GGUF: {', '.join(FAMILIES)}"


def refuse(kinds: Sequence[str], wrong: str | None) -> None:
    """UserError for those of the kinds of export that are GGUF, if something is wrong with them."""
    asked = ", ".join(kind for kind in kinds if kind in KINDS)
    if asked and wrong:
        raise UserError(f"--to {asked}: {wrong}; leave {asked} out of --to, or take another kind, such as hf")


def problem_of_config(model: PreTrainedModel) -> str | None:
    """What `problem` says of the model whatever is pruned of it; its weights are not looked at."""
    if (stranger := unknown(model)) is not None:
        return stranger
    config = model.config.get_text_config()
    family = FAMILIES[config.model_type]
    if family.norm_offset > 0 and "sliding_attention" not in config.layer_types:  # GGML_ASSERT(hparams.is_swa_any())
        return (
            f"no layer has a sliding window, and llama.cpp ends its process on such a {family.arch}: keep one of them"
        )
    wrong = [fact for fact in _facts(model, family) if not _same(fact[1], fact[2])]
    return "{} is {}, and llama.cpp computes with {}".format(*wrong[0]) if wrong else None


def problem(model: PreTrainedModel) -> str | None:
    """Why llama.cpp would not load the model, or would compute something else; None if it takes it."""
    config = model.config.get_text_config()
    if (stranger := unknown(model)) is not None:
        return stranger
    widths, family = widths_of(model), FAMILIES[config.model_type]
    if not widths.even and family.uneven is None:
        return f"its layers differ in width, and llama.cpp takes a {family.arch} with one width for all: {UNIFORM}"
    if not widths.heads[0]:
        return "the first layer lost all its heads, and llama.cpp takes the size of heads from it: keep one there"
    rows = widths.heads[0] * _head_size(model)
    if family.arch == "qwen2" and rows != config.hidden_size:
        return f"llama.cpp takes a qwen2 with {config.hidden_size} rows of queries, and {rows} are left: keep its heads"
    if any(not heads and _has_bias(layer) for heads, layer in zip(widths.heads, _layers(model), strict=True)):
        return "a layer lost all its heads, and the bias of their output is left: keep a head of each layer"
    return problem_of_config(model)


def _facts(model: PreTrainedModel, family: Family) -> Iterator[tuple[str, Any, Any]]:
    """(what, as the model has it, as llama.cpp takes it) of all that no key of the file says."""
    config, body = model.config.get_text_config(), model.get_decoder()
    gemma, width, size = family.norm_offset > 0, config.hidden_size, _head_size(model)
    largest = gemma and len(_layers(model)) == {"gemma2": 46, "gemma3": 62}[family.arch]
    scale = (width // config.num_attention_heads if largest else size) ** -0.5
    rope = _rope(config)
    yield "hidden_size", width, body.embed_tokens.weight.shape[1]
    yield "the activation", getattr(config, "hidden_act", None) or config.hidden_activation, family.activation
    yield "the scale of attention", getattr(_layers(model)[0].self_attn, "scaling", scale), scale
    yield "the scale of embeddings", getattr(body.embed_tokens, "scalar_embed_scale", 1.0), width**0.5 if gemma else 1.0
    yield "rope_type", rope["rope_type"], rope["rope_type"] if rope["rope_type"] in ROPES else " or ".join(ROPES)
    yield "partial_rotary_factor", rope.get("partial_rotary_factor") or 1.0, 1.0
    epsilon = getattr(body.norm, "eps", None) or body.norm.variance_epsilon
    yield "the epsilon of the last norm", epsilon, config.rms_norm_eps
    if family.arch != "llama":
        yield "the bias of attention's output", _layers(model)[0].self_attn.o_proj.bias is not None, False
    if gemma:
        yield "tie_word_embeddings", _tied(model), True
        yield "use_bidirectional_attention", bool(getattr(config, "use_bidirectional_attention", False)), False
        yield "attn_logit_softcapping", bool(config.attn_logit_softcapping), family.arch == "gemma2"
    if family.arch == "gemma2":
        yield "final_logit_softcapping", bool(config.final_logit_softcapping), True


def _same(value: Any, taken: Any) -> bool:
    both = isinstance(value, float) and isinstance(taken, float)
    return math.isclose(value, taken, rel_tol=1e-6) if both else bool(value == taken)


def _has_bias(layer: Any) -> bool:
    """Whether a bias of attention is left where its heads are gone."""
    return any(name.startswith("self_attn.") and name.endswith("bias") for name, _ in layer.named_parameters())


def _layers(model: PreTrainedModel) -> Any:
    return model.get_decoder().layers


ROPES = ("default", "linear", "llama3")


def _rope(config: Any) -> Mapping[str, Any]:
    """Settings of rotary embeddings; of a model with two kinds of layers those of the layers that see everything."""
    found: Mapping[str, Any] = config.rope_parameters
    return found.get("full_attention", found)


def _head_size(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _tied(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def widths_of(model: PreTrainedModel) -> Widths:
    """Heads, key/value heads and neurons of every layer of a decoder."""
    size, found = _head_size(model), Widths([], [], [])
    for layer in _layers(model):
        for values, path, unit in (
            (found.heads, "self_attn.q_proj", size),
            (found.key_heads, "self_attn.k_proj", size),
            (found.neurons, "mlp.gate_proj", 1),
        ):
            module: Any = layer
            for name in path.split("."):
                module = getattr(module, name, None)
            values.append(module.weight.shape[0] // unit if hasattr(module, "weight") else 0)
    return found


# ---------------------------------------------------------------------------------------------- writing


def save_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, path: Path, kind: str, name: str
) -> list[str]:
    """Write `model` to `path`; returns what to know about the file.

    kind: the type of matrices, "F32", "F16", "BF16" or "Q8_0" (8 bits, a scale for every 32 weights of a row; F16 for
    rows that are not a multiple of 32). Vectors are F32. UserError if llama.cpp would not take the model.
    """
    from gguf import GGUFWriter, LlamaFileType

    if (wrong := problem(model)) is not None:
        raise UserError(f"{path}: {wrong}")
    widths, family = widths_of(model), FAMILIES[model.config.get_text_config().model_type]
    arch = family.arch if widths.even else str(family.uneven)
    writer = GGUFWriter(path, arch)
    writer.add_name(name)
    writer.add_file_type(LlamaFileType.ALL_F32 if kind == "F32" else getattr(LlamaFileType, f"MOSTLY_{kind}"))
    _add_sizes(writer, model, widths)
    notes = add_words(writer, tokenizer, _words_and_width(model)[0])
    for label, tensor in _tensors(model, arch, family, widths):
        _add_tensor(writer, label, np.ascontiguousarray(tensor.detach().float().numpy()), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if arch == "deci":
        notes.append('Layers differ in width: written as "deci", the Llama with a width for each layer.')
    sliding = _sliding(model)
    if family.period and sliding != [(layer + 1) % family.period > 0 for layer in range(len(sliding))]:
        notes.append(UNUSUAL.format(arch, family.period))
    return notes


def _sliding(model: PreTrainedModel) -> list[bool]:
    """Of each layer, whether it has a sliding window; empty where the config does not say it."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    return [kind == "sliding_attention" for kind in kinds]


def _words_and_width(model: PreTrainedModel) -> tuple[int, int]:
    weight: Any = model.get_input_embeddings().weight
    return weight.shape[0], weight.shape[1]


def _add_tensor(writer: GGUFWriter, name: str, data: np.ndarray, kind: str) -> None:
    from gguf import GGMLQuantizationType as Types
    from gguf import quantize

    if data.ndim < 2:
        kind = "F32"
    elif kind == "Q8_0" and data.shape[-1] % 32:
        kind = "F16"
    dtype = Types[kind]
    writer.add_tensor(name, quantize(data, dtype), raw_dtype=dtype)


def _add_sizes(writer: GGUFWriter, model: PreTrainedModel, widths: Widths) -> None:
    """The sizes of the model, in llama.cpp's keys."""
    config, size = model.config.get_text_config(), _head_size(model)
    num_words, width = _words_and_width(model)
    sliding = _sliding(model)
    window: Any = getattr(config, "sliding_window", None)
    length = config.max_position_embeddings
    if config.model_type.startswith("gemma"):
        writer.add_sliding_window(window)
        writer.add_sliding_window_pattern(sliding)
    elif window and (any(sliding) or not sliding):
        length = min(length, window)  # llama.cpp has no window for these: within one, it is all the same
    writer.add_block_count(len(widths.heads))
    writer.add_context_length(length)
    writer.add_embedding_length(width)
    writer.add_vocab_size(num_words)
    one = widths.even
    writer.add_feed_forward_length(widths.neurons[0] if one else _filled(widths))
    writer.add_head_count(widths.heads[0] if one else widths.heads)
    writer.add_head_count_kv(widths.key_heads[0] if one else widths.key_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if "sliding_attention" in config.rope_parameters:
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


# ---------------------------------------------------------------------------------------------- tensors


def _tensors(model: PreTrainedModel, arch: str, family: Family, widths: Widths) -> Iterator[tuple[str, Tensor]]:
    """(name in the file, values) of every tensor that llama.cpp reads."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == arch)
    names = get_tensor_name_map(number, len(widths.heads))
    unread = _unread(widths)
    for name, tensor in model.state_dict().items():
        if (name == "lm_head.weight" and _tied(model)) or name in unread or not tensor.numel():
            continue
        label = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if label is None:
            raise RuntimeError(f"{name}: llama.cpp has no such tensor in a {arch}; nothing was exported")
        yield label, _as_llama_cpp_has_it(name, tensor, family, widths)
    yield from _without_effect(model, widths)
    if _rope(model.config.get_text_config())["rope_type"] == "llama3":
        yield "rope_freqs.weight", _slowed(model)


def _as_llama_cpp_has_it(name: str, tensor: Tensor, family: Family, widths: Widths) -> Tensor:
    if family.norm_offset and name.endswith("norm.weight"):
        return tensor + family.norm_offset
    part = name.rpartition(".")[0].rpartition(".")[2]
    if family.permuted and part in ("q_proj", "k_proj"):
        layer = int(name.split(".layers.")[1].split(".")[0])
        heads = (widths.heads if part == "q_proj" else widths.key_heads)[layer]
        return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)
    return tensor


def _filled(widths: Widths) -> list[int]:
    """Neurons of every layer: llama.cpp drops what attention gives where there are none, so one is left there."""
    return [number or int(heads > 0) for number, heads in zip(widths.neurons, widths.heads, strict=True)]


def _without_effect(model: PreTrainedModel, widths: Widths) -> Iterator[tuple[str, Tensor]]:
    """The neurons of `_filled` that the model has not: zeros."""
    width = model.config.get_text_config().hidden_size
    for layer, (number, filled) in enumerate(zip(widths.neurons, _filled(widths), strict=True)):
        if number < filled:
            yield f"blk.{layer}.ffn_gate.weight", torch.zeros(filled, width)
            yield f"blk.{layer}.ffn_up.weight", torch.zeros(filled, width)
            yield f"blk.{layer}.ffn_down.weight", torch.zeros(width, filled)


def _unread(widths: Widths) -> set[str]:
    """Norms before what is gone: a file with a tensor that llama.cpp does not read is refused by it."""
    norms = [
        ("input_layernorm", [layer for layer, number in enumerate(widths.heads) if not number]),
        ("post_attention_layernorm", [layer for layer, number in enumerate(_filled(widths)) if not number]),
    ]
    return {f"model.layers.{layer}.{norm}.weight" for norm, layers in norms for layer in layers}


def _slowed(model: PreTrainedModel) -> Tensor:
    """By how much each frequency of Llama 3's rotary embeddings is divided, (head size / 2,)."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = model.config.get_text_config()
    base, size = _rope(config)["rope_theta"], _head_size(model)
    plain = base ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    slower: Tensor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
    return (plain / slower.double()).float()
