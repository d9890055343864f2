"""Small run folders as launch/prune.py leaves them, made without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from leap_dist.core.measure import amounts
from leap_dist.export import certificate as cert
from leap_dist.export.hf import save_model
from leap_dist.run_folder import HIDDEN

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "num_labels": 3,
}
DECODER: dict[str, Any] = SIZES | {"num_key_value_heads": 2, "pad_token_id": 0}
QUERY = "bert.encoder.layer.0.attention.self.query.weight"
UP = "bert.encoder.layer.0.intermediate.dense.weight"
DOWN = "bert.encoder.layer.0.output.dense.weight"

Masks = dict[str, torch.Tensor]


def classifier(kind: str = "bert", **settings: Any) -> Any:
    """A random sequence classifier with biases and norms that are not trivial."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    sizes = SIZES if kind == "bert" else DECODER
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **sizes | settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def language_model(**settings: Any) -> Any:
    """A random Llama that predicts words."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {key: value for key, value in DECODER.items() if key != "num_labels"} | settings
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)).eval()


def xlnet() -> Any:
    """A random XLNet classifier, whose config says -1 positions."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = AutoConfig.for_model("xlnet", vocab_size=40, d_model=32, n_layer=2, n_head=4, d_inner=24)
    return AutoModelForSequenceClassification.from_config(config).eval()


def element_masks(model: Any) -> Masks:
    """Half of two matrices of the first layer of a BERT."""
    return {name: torch.rand_like(model.get_parameter(name)) < 0.5 for name in (QUERY, UP)}


def structure_masks(model: Any) -> Masks:
    """Of a BERT: head 1 of layer 0 and every third neuron of both layers."""
    masks: Masks = {}
    head = torch.arange(32) // 8 != 1
    for part in ("query", "key", "value"):
        place = f"bert.encoder.layer.0.attention.self.{part}"
        masks |= {f"{place}.weight": head[:, None].expand(32, 32).clone(), f"{place}.bias": head.clone()}
    masks["bert.encoder.layer.0.attention.output.dense.weight"] = head.expand(32, 32).clone()
    neuron = torch.arange(48) % 3 != 0
    for layer in range(2):
        place = f"bert.encoder.layer.{layer}"
        masks[f"{place}.intermediate.dense.weight"] = neuron[:, None].expand(48, 32).clone()
        masks[f"{place}.intermediate.dense.bias"] = neuron.clone()
        masks[f"{place}.output.dense.weight"] = neuron.expand(32, 48).clone()
    return masks


def layer_masks(model: Any) -> Masks:
    """Of a BERT: all of its last layer, as a `depth` gate leaves it."""
    parts = (name for name, _ in model.named_parameters() if name.startswith("bert.encoder.layer.1."))
    return {name: torch.zeros_like(model.get_parameter(name), dtype=torch.bool) for name in parts}


def expert_masks(model: Any) -> Masks:
    """Of a Mixtral with four experts: expert 1 of every layer."""
    alive = torch.tensor([True, False, True, True])
    return {
        name: alive.view(-1, *[1] * (value.dim() - 1)).expand(value.shape).clone()
        for name, value in model.named_parameters()
        if "experts" in name or name.endswith("gate.weight")
    }


def make_run(folder: Path, model: Any, masks: Masks, granularity: str = "element", fixed: float | None = None) -> Path:
    """A finished run whose model has these masks; matrices are counted, biases follow.

    fixed: parameters in no gate, of a run whose target is a share of all parameters.
    """
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, ((name, value.detach()) for name, value in model.named_parameters()), folder / "model")
    gates = [
        {"name": f"{name}:{granularity}", "granularity": granularity, "tensors": [name]}
        for name, mask in masks.items()
        if mask.dim() > 1
    ]
    hidden: Masks = {}
    counts = cert.count(folder / "model", sorted(masks.items()), gates, hidden=hidden)
    if hidden:
        save_file(hidden, folder / HIDDEN)
    metrics = {"dense": {"accuracy": 0.9}, "pruned": {"accuracy": 0.8}}
    measure = None if fixed is None else {"name": "parameters", "fixed": fixed}
    kept, total = amounts(counts, measure)
    built = cert.build(counts, target=kept / total if total else 1.0, unit=1, metrics=metrics, seed=0, measure=measure)
    cert.write(folder / "certificate.json", built)
    (folder / "config.json").write_text(json.dumps({"leap": {}, "model": {}, "data": {"task": "builtin/clock"}}))
    return folder
