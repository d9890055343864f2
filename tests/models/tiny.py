"""Tiny models with random weights of every architecture in the tables, and the masking of their units."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from leap_dist.models.blocks import find_structures
from leap_dist.models.pruned_folder import save_shrunk
from leap_dist.models.pruned_json import PrunedJson
from leap_dist.models.shrink import shrink_
from leap_dist.models.structures import Structure

BASE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}
GROUPED = BASE | {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED_PLAIN = {key: value for key, value in GROUPED.items() if key != "head_dim"}
POSITIONS = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 4, "vocab_size": 64}

SETTINGS: dict[str, dict[str, Any]] = {
    "albert": BASE | {"embedding_size": 16},
    "bert": BASE,
    "deberta": BASE | POSITIONS,
    "deberta-v2": BASE | POSITIONS | {"share_att_key": False, "position_buckets": 8, "norm_rel_ebd": "layer_norm"},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "vocab_size": 64}
    | {"max_position_embeddings": 32},
    "electra": BASE | {"embedding_size": 16},
    "gemma2": GROUPED,
    "gemma3_text": GROUPED,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 24, "vocab_size": 64, "n_positions": 32}
    | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    "llama": GROUPED | {"attention_bias": True, "mlp_bias": True},
    "mistral": GROUPED,
    "mixtral": GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 24, "vocab_size": 64}
    | {"max_position_embeddings": 32, "word_embed_proj_dim": 32},
    "phi3": GROUPED_PLAIN,
    "qwen2": GROUPED_PLAIN,
    "qwen3": GROUPED,
    "qwen3_moe": GROUPED
    | {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "mlp_only_layers": [0]}
    | {"decoder_sparse_step": 1, "norm_topk_prob": True},
    "roberta": BASE | {"pad_token_id": 1},
    "t5": T5,
    "vit": {key: value for key, value in BASE.items() if key not in ("vocab_size", "max_position_embeddings")}
    | {"image_size": 16, "patch_size": 8},
}
"""By model_type. Odd traits: grouped queries, biases, a dense layer among experts."""


DEEPER: dict[str, dict[str, Any]] = {kind: {"num_hidden_layers": 4} for kind in SETTINGS} | {
    "distilbert": {"n_layers": 4},
    "gpt2": {"n_layer": 4},
    "t5": {"num_layers": 4, "num_decoder_layers": 4},
}
"""More layers than two."""

HEADS = {
    **dict.fromkeys(SETTINGS, "AutoModelForCausalLM"),
    **dict.fromkeys(
        ("albert", "bert", "deberta", "deberta-v2", "distilbert", "electra", "roberta"), "AutoModelForMaskedLM"
    ),
    "t5": "AutoModelForSeq2SeqLM",
    "vit": "AutoModelForImageClassification",
}
"""What answers, of as many numbers however wide the model is."""

EAGER_ONLY = ("deberta", "deberta-v2", "gemma2")
"""What has no sdpa."""


def tiny(kind: str, head: str = "AutoModel", attention: str = "sdpa", **changes: Any) -> PreTrainedModel:
    """A model in evaluation mode whose biases are not zero."""
    import transformers

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SETTINGS[kind] | changes))
    cls = getattr(transformers, head)
    build = cls.from_config if head.startswith("Auto") else cls._from_config
    model: PreTrainedModel = build(config, attn_implementation=attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_(0, 0.1)
            elif parameter.dim() > 1:
                parameter.normal_(0, 0.2)  # larger than usual: what a unit does must show in the result
    return model.eval()


@torch.no_grad()
def mask_units_(model: nn.Module, structure: Structure, units: Iterable[int]) -> None:
    """Set all parts of the units to zero."""
    for unit in units:
        for part in structure.parts:
            run = model.get_parameter(part.tensor).narrow(part.axis, part.start + unit * part.size, part.size)
            run.zero_()


def mask_some_(model: nn.Module) -> dict[str, list[int]]:
    """Mask random units of every structure, another number in each; returns those left."""
    generator, left = torch.Generator().manual_seed(1), {}
    for place, structure in enumerate(find_structures(model)):
        order = torch.randperm(structure.num_units, generator=generator).tolist()
        cut = max(1, structure.num_units * (1 + place % 3) // 4)
        mask_units_(model, structure, order[:cut])
        left[structure.name] = sorted(order[cut:])
    return left


def save_masked(model: PreTrainedModel, folder: Path, **arguments: Any) -> tuple[PrunedJson, PreTrainedModel]:
    """Shrink a copy and save it; the manifest and the copy."""
    shrunk = copy.deepcopy(model)
    return save_shrunk(shrunk, shrink_(shrunk), folder, **arguments), shrunk
