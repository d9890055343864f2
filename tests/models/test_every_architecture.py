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

TASKS: dict[str, dict[str, Any]] = {
    "classifier": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "questions": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "next word": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked word": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
}
DEPTH = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")
ASKED: dict[str, dict[str, Any]] = {
    "afmoe": {"num_experts": 8},
    "esm": {"vocab_size": 33},
    "funnel": {"block_sizes": [1, 1]},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "prophetnet": {"num_encoder_layers": 2, "num_decoder_layers": 2},
    "reformer": {"is_decoder": True},
}
"""What a config has to be given before transformers builds the model."""
OWN_COUNT = {"zaya": 1}
"""Where a router has more outputs than experts: one to skip them all."""
BY_TASK = {("reformer", "masked word"): {"is_decoder": False}}


def small_config(kind: str, task: str) -> Any:
    """The default config, of few layers; widths cost nothing on the meta device."""
    config = CONFIG_MAPPING[kind](**(ASKED.get(kind, {}) | BY_TASK.get((kind, task), {})))
    for part in (config, config.get_text_config()):
        for key in DEPTH:
            if kind not in ("funnel", "prophetnet") and isinstance(size := getattr(part, key, None), int) and size > 3:
                setattr(part, key, 3)
    return config


def build(kind: str, task: str) -> PreTrainedModel:
    name = TASKS[task][kind]
    cls = getattr(transformers, name if isinstance(name, str) else name[0])
    with torch.device("meta"), no_init_weights():
        model: PreTrainedModel = cls(small_config(kind, task))
    return model


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


@pytest.mark.parametrize("kind", sorted({kind for names in TASKS.values() for kind in names}))
def test_what_is_pruned_by_default(kind: str) -> None:
    built = 0
    for task in (task for task, names in TASKS.items() if kind in names):
        try:
            model = build(kind, task)
        except (ValueError, TypeError, AttributeError, ImportError, LookupError):
            continue  # transformers itself does not build it from its own defaults
        built += 1
        counts = set(expert_counts(model.config.to_dict()))
        routers = ({1} if counts else set()) | counts | {count + OWN_COUNT.get(kind, 0) for count in counts}
        inside = layers_of(model.base_model)
        expected, received = set(), set(prunable_matrices(model))
        for name, module in model.named_modules():
            if id(module) in inside and not (isinstance(module, nn.Linear) and module.out_features in routers):
                expected.add(f"{name}.weight")
        fused = {name for name in received if model.get_parameter(name).dim() == 3}
        assert received - fused == expected, (task, received ^ expected)
        assert len(expected) > 0 or not inside
    assert built or kind in NOT_BUILT, "transformers builds it from no task"


NOT_BUILT: set[str] = set()
