"""The residual stream of a model: its dimensions, where they lie in all tensors, and a model without some of them.

What follows the width is found by building the model, without memory, from a config of twice the width: axes of tensors
and numbers in modules that grow with it, but those of heads, neurons and experts, are the stream's.

A root-mean-square norm over d dimensions of which k are left divides by less than one over k does. With the stream
times c (1, or where embeddings are multiplied by the root of the width sqrt(k/d)), weights times sqrt(d/k) and an
epsilon of c^2 d/k times what it was give the same. A LayerNorm is over kept dimensions already (norms.py).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from leap_dist.config.family import AttentionFamily, ExpertsFamily, FamilyConfig
from leap_dist.errors import UserError
from leap_dist.models.blocks import find_blocks, tensor_shapes
from leap_dist.models.body import stacked
from leap_dist.models.families import family_of, is_conv1d, prunable_matrices
from leap_dist.models.norms import is_layer_norm
from leap_dist.models.structures import Block, UnitRun

NAME = "stream"


@dataclass(frozen=True)
class Stream:
    """The dimensions of a residual stream.

    parts: where they lie; a tensor may have them along two axes (a pooler). sizes: (path of a module, attribute) of
    numbers that are the width.
    """

    table: FamilyConfig
    width: int
    parts: tuple[UnitRun, ...]
    sizes: tuple[tuple[str, str], ...]


def find_stream(model: nn.Module, family: FamilyConfig | None = None) -> Stream | None:
    """The residual stream of a model; None where `stream_of` finds none."""
    try:
        return stream_of(model, family)
    except UserError:
        return None


def stream_of(model: nn.Module, family: FamilyConfig | None = None) -> Stream:
    """As `find_stream`. Raises UserError, without the key, which says why there is none."""
    table, config = family or family_of(model), getattr(model, "config", None)
    if table is None or config is None or not table.hidden:
        raise UserError("the key of its config for the width is not known here")
    width = getattr(config, table.hidden[0])
    try:
        with torch.device("meta"):
            wide = type(model)(with_width(config, table, 2 * width))
    except Exception as error:
        raise UserError(f"it cannot be built with another width: {error}") from error
    blocks = find_blocks(model, family)
    parts = tuple(_parts(model, wide, width, blocks, table))
    return Stream(table, width, parts, tuple(_sizes(model, wide, width, blocks)))


def with_width(config: Any, table: FamilyConfig, width: int) -> Any:
    """A copy of a config with another width, and with what has to be as large."""
    wide, before = copy.deepcopy(config), getattr(config, table.hidden[0])
    for key in table.hidden:
        if getattr(config, key, None) == before:
            setattr(wide, key, width)
    return wide


def _parts(
    model: nn.Module, wide: nn.Module, width: int, blocks: Sequence[Block], table: FamilyConfig
) -> Iterator[UnitRun]:
    covered = {(part.tensor, part.axis): part.counted for block in blocks for part in block.structure.parts}
    uncounted = {tensor for (tensor, _), counted in covered.items() if not counted}
    larger, body, prunable = tensor_shapes(wide), stacked(model), set(prunable_matrices(model, table))
    for name, shape in tensor_shapes(model).items():
        if len(larger.get(name, ())) != len(shape):
            raise UserError(f"{name} is not there at another width")
        inside = name.startswith(body)
        matrix = math.prod(shape) > width and name not in uncounted and (name in prunable or not inside)
        for axis, (size, other) in enumerate(zip(shape, larger[name], strict=True)):
            if size == other or (name, axis) in covered:
                continue
            if size != width:
                raise UserError(f"axis {axis} of {name} has {size} indices, which are more than its width of {width}")
            yield UnitRun(name, axis, 0, 1, counted=matrix)
    for name, module in model.named_modules():
        if is_layer_norm(module) and getattr(module, "weight", None) is None:
            raise UserError(f"{name} is a norm without weights, which cannot say what is left")


def _sizes(model: nn.Module, wide: nn.Module, width: int, blocks: Sequence[Block]) -> Iterator[tuple[str, str]]:
    """Numbers that are the width, but those that heads and neurons give."""
    own = {(resize.module, resize.attribute) for block in blocks for resize in block.structure.resizes}
    others = dict(wide.named_modules())
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            grows = type(value) is int and value == width and getattr(others[path], key, None) == 2 * width
            if grows and (path, key) not in own:
                yield path, key


# ---------------------------------------------------------------------------------------------- without some of them


def living_dimensions(stream: Stream, tensors: Mapping[str, torch.Tensor]) -> list[int]:
    """The dimensions that some tensor has: one that left is zero in all of them."""
    alive = torch.zeros(stream.width, dtype=torch.bool)
    for part in stream.parts:
        values = tensors[part.tensor].detach().movedim(part.axis, 0).reshape(stream.width, -1)
        alive |= (values != 0).any(1).cpu()
    return alive.nonzero().flatten().tolist()


def narrow_(model: nn.Module, stream: Stream, kept: Collection[int], blocks: Sequence[Block]) -> None:
    """Leave only the dimensions `kept`, ascending, such that the model computes what it did with the others zero."""
    index, num = torch.tensor(sorted(kept)), len(kept)
    scale = math.sqrt(num / stream.width) if stream.table.scaled_embeddings else 1.0  # c
    _fold_(model, stream, num, scale, blocks)
    for part in stream.parts:
        parameter = model.get_parameter(part.tensor)
        parameter.data = parameter.data.index_select(part.axis, index.to(parameter.device))
        parameter.grad = None
    for path, key in stream.sizes:
        setattr(model.get_submodule(path), key, num)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.normalized_shape = tuple(module.weight.shape)
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif is_conv1d(module):
            module.nx, module.nf = module.weight.shape  # type: ignore[assignment, misc]
        elif stream.table.scaled_embeddings and hasattr(module, "scalar_embed_scale"):
            module.scalar_embed_scale = num**0.5
            module.embed_scale.fill_(num**0.5)  # type: ignore[operator]


def epsilon_of(stream: Stream, num_kept: int, epsilon: float) -> float:
    """The epsilon of root-mean-square norms in the smaller model."""
    return epsilon if stream.table.scaled_embeddings else epsilon * stream.width / num_kept


def _fold_(model: nn.Module, stream: Stream, num_kept: int, scale: float, blocks: Sequence[Block]) -> None:
    """Change the weights around root-mean-square norms, and their epsilons, as the head of this file says."""
    table, ratio, axes = stream.table, num_kept / stream.width, {part.tensor for part in stream.parts}
    for path, norm in model.named_modules():
        key = next((key for key in ("eps", "variance_epsilon") if hasattr(norm, key)), None)
        if key is None or is_layer_norm(norm):
            continue
        if f"{path}.weight" in axes:
            factor = 1.0 / math.sqrt(ratio)
            if path.endswith(tuple(f".{name}" for name in table.output_norms)) and table.output_norms:
                factor *= scale
            if path == table.scaled_output and _scales_output(model):
                factor *= math.sqrt(ratio)
            one = 1.0 if table.norm_adds_one else 0.0
            norm.weight.data = (norm.weight.data + one) * factor - one
        setattr(norm, key, epsilon_of(stream, num_kept, getattr(norm, key)))
    for block in blocks:
        for path, factor in _factors(model, block, ratio, scale, table):
            linear = model.get_submodule(block.path(path))
            for parameter in linear.parameters(recurse=False):
                parameter.data = parameter.data * factor


def _factors(
    model: nn.Module, block: Block, ratio: float, scale: float, table: FamilyConfig
) -> Iterator[tuple[str, float]]:
    """Modules of a block whose outputs a norm takes, and what they are multiplied with as its epsilon changed."""
    found = block.table
    if table.output_norms and not isinstance(found, ExpertsFamily):
        yield found.output if isinstance(found, AttentionFamily) else found.down, scale
    for norm, module in (("query_norm", "query"), ("key_norm", "key")):
        name = getattr(found, norm, None)
        if name is not None and block.path(name) in dict(model.named_modules()):
            yield getattr(found, module), scale / math.sqrt(ratio)


def _scales_output(model: nn.Module) -> bool:
    """T5 divides what its head is given by the root of the width."""
    head: Callable[[], object] = getattr(model, "get_output_embeddings", lambda: None)
    return bool(getattr(model.config, "scale_decoder_outputs", False)) and head() is not None
