"""What is pruned by default, in every text architecture that the installed transformers has; nothing is listed here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from leap_dist.models.families import prunable_matrices
from leap_dist.models.inputs import axes_of
from leap_dist.models.views import Owners

pytestmark = pytest.mark.slow

TASKS: dict[str, dict[str, Any]] = {
    "classifier": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "questions": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "next word": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked word": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
}
DEPTH = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")
ASKED: dict[str, dict[str, Any]] = {
    "afmoe": {"num_experts": 8},
    "axk2": {"index_head_dim": 96},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1},
    "esm": {"vocab_size": 33},
    "funnel": {"block_sizes": [1, 1]},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "prophetnet": {"num_encoder_layers": 2, "num_decoder_layers": 2},
    "reformer": {"is_decoder": True},
}
"""What a config has to be given before transformers builds the model."""
ROUTERS = {"longcat_flash": ".mlp.router.", "zaya": ".mlp.gate."}
"""Where a router has several layers, or more outputs than experts."""
EXPERTS = tuple(
    [f"experts.{name}_proj" for name in ("gate_up", "gate", "up", "down")]
    + [f".{name}_linear.weight" for name in ("input", "output")]  # of JetMoe
)
"""How the fused weights of experts end."""
BY_TASK = {("reformer", "masked word"): {"is_decoder": False}}


KINDS = sorted({kind for names in TASKS.values() for kind in names})
NOT_BUILT = {
    *("cohere_compass_text", "dbrx", "dots3_note", "emu3", "gemma3n", "gemma4_assistant", "layoutlmv2"),
    *("llama4", "musicgen", "musicgen_melody", "qwen3_5_moe", "qwen4_exp"),
}
"""What transformers does not build from its own defaults, or not without libraries that are not here."""


def small_config(kind: str, task: str, depth: int) -> Any:
    """The default config with fewer layers; widths cost nothing on the meta device."""
    config = CONFIG_MAPPING[kind](**(ASKED.get(kind, {}) | BY_TASK.get((kind, task), {})))
    for part in (config, config.get_text_config()):
        for key in DEPTH:
            if isinstance(size := getattr(part, key, None), int) and size > depth:
                setattr(part, key, depth)
    return config


def build(kind: str, task: str) -> PreTrainedModel | None:
    """The model; None where transformers does not build it from its own defaults."""
    name = TASKS[task][kind]
    cls = getattr(transformers, name if isinstance(name, str) else name[0])
    for depth in (3, 1000):
        try:
            with torch.device("meta"), no_init_weights():
                model: PreTrainedModel = cls(small_config(kind, task, depth))
        except Exception:  # whatever transformers comes to; NOT_BUILT says for which
            continue
        return model
    return None


def expert_counts(value: Any, key: str = "") -> Iterator[int]:
    """Every number of a config that counts experts."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from expert_counts(inner, name)
    elif isinstance(value, int) and "expert" in key and key.startswith(("n_", "num_", "moe_num_")):
        yield value


def layers_of(base: nn.Module) -> dict[int, str]:
    """The linear layers inside a list of layers of the base model, and their names; poolers and such are in none."""
    lists = [module for module in base.modules() if isinstance(module, nn.ModuleList)]
    inside = {id(part) for modules in lists for part in modules.modules()}
    linear = {name: part for name, part in base.named_modules() if isinstance(part, nn.Linear | Conv1D)}
    return {id(part): name for name, part in linear.items() if id(part) in inside}


def is_router(kind: str, name: str, module: nn.Module, counts: set[int]) -> bool:
    """By the number of outputs, of which no other layer has as many, but for shared experts."""
    if (place := ROUTERS.get(kind)) is not None:
        return place in name
    return bool(counts) and getattr(module, "out_features", 0) in {1, *counts} and "shared_expert." not in name


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_pruned_by_default(kind: str) -> None:
    models = [model for task, names in TASKS.items() if kind in names and (model := build(kind, task)) is not None]
    assert (not models) == (kind in NOT_BUILT), f"transformers builds {kind} from {len(models)} tasks"
    for model in models:
        counts = set(expert_counts(model.config.to_dict()))
        inside = layers_of(model.base_model)
        expected = {
            f"{name}.weight"
            for name, module in model.named_modules()
            if id(module) in inside and not is_router(kind, name, module, counts)
        }
        expected |= {n for n, p in model.named_parameters() if p.dim() == 3 and n.endswith(EXPERTS)}
        received = set(prunable_matrices(model))
        assert received == expected, (type(model).__name__, received ^ expected)
        owners = Owners(model)
        hidden = [name for name in received if axes_of(owners.of(name), name, owners.shape(name)) is None]
        assert not hidden, f"scores cannot start by the inputs of {hidden}"
