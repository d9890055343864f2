"""Which part of a transformers model is its body: the layers that repeat, without heads, poolers and routers.

Found by structure, so that it holds for architectures that nobody listed: the base model, the lists of modules in it,
the output embeddings, and what stands beside a block of experts.
"""

from __future__ import annotations

from torch import nn

POOLERS = ("pooler", "contact_head")
"""Heads that transformers keeps inside the base model."""


def is_transformers(model: nn.Module) -> bool:
    return hasattr(model, "config") and hasattr(model, "base_model_prefix")


def body_prefix(model: nn.Module) -> str:
    """What the names of the base model's tensors begin with; "" where the model is its own base, or no transformer."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    return f"{prefix}." if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""


def is_head(model: nn.Module, name: str) -> bool:
    """Whether a tensor of that name is part of what turns hidden states into answers: a head, or a pooler.

    The name need not be one of `model`: a file may hold the head of another task. In a model that is its own base
    (T5's for questions) heads are the children that have no layers and embed no words.
    """
    prefix = body_prefix(model)
    if not name.startswith(prefix):
        return name.partition(".")[0] not in _children(model.get_submodule(prefix[:-1]))
    first = name.removeprefix(prefix).partition(".")[0]
    if first in POOLERS:
        return True
    if prefix or not is_transformers(model):
        return False
    return first not in _children(model) or _has_no_body(model, getattr(model, first))


def _children(module: nn.Module) -> set[str]:
    """Names of what a module holds directly."""
    tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return {name for name, _ in (*module.named_children(), *tensors)}


def _has_no_body(model: nn.Module, part: object) -> bool:
    if not isinstance(part, nn.Module):
        return False
    words = model.get_input_embeddings()  # type: ignore[operator]
    return not any(isinstance(module, nn.ModuleList) or module is words for module in part.modules())


def stacked(model: nn.Module) -> tuple[str, ...]:
    """What the names of the layers in the body begin with; none where the body is no stack of layers."""
    prefix = body_prefix(model)
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return tuple(f"{name}." for name in lists if f"{name}.".startswith(prefix))


def find_routers(model: nn.Module) -> set[str]:
    """Paths of the modules that say how much of a token goes to which expert, or to a shared one.

    They stand beside the experts, and end in one number an expert (one more where a token may skip them all), or in
    one number for the shared expert.
    """
    modules = dict(model.named_modules())
    found = set()
    for path, module in modules.items():
        if counts := _num_experts(module):
            parent = path.rpartition(".")[0]
            beside = {f"{parent}.{name}".lstrip("."): child for name, child in modules[parent].named_children()}
            del beside[path]
            outputs = {name: _answers(child) for name, child in beside.items()}
            if isinstance(module, nn.ModuleList | nn.ModuleDict) and not counts & set(outputs.values()):
                continue  # a list of modules that nothing chooses among
            asked = counts | {count + 1 for count in counts} | {1}
            found |= {name for name, answers in outputs.items() if answers in asked}
    return found


def _num_experts(module: nn.Module) -> set[int]:
    """How many experts a module holds, in fused tensors or as a list; empty if they are none."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return {len(module)} if len(module) > 1 else set()
    if isinstance(module, nn.modules.conv._ConvNd):
        return set()
    shapes = [tuple(getattr(p, "ds_shape", p.shape)) for p in module.parameters(recurse=False)]
    return {shape[0] for shape in shapes if len(shape) == 3 and min(shape[1:]) > 1 and shape[0] < max(shape[1:])}


def _answers(module: nn.Module) -> int | None:
    """How many numbers come out of a module's linear layers; None if they return to the width that they take."""
    linear = [part for part in module.modules() if isinstance(part, nn.Linear)]
    if not linear or any(part.out_features == linear[0].in_features for part in linear):
        return None
    return linear[-1].out_features
