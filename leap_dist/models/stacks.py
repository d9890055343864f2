"""Whole layers: which of them can leave a model, and the names of those that stay in a model without the others."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from torch import nn

from leap_dist.config.family import FamilyConfig
from leap_dist.models.blocks import find_blocks, is_anchored, tensor_shapes
from leap_dist.models.families import family_of, prunable_matrices
from leap_dist.models.layer import layer_paths
from leap_dist.models.norms import is_layer_norm
from leap_dist.models.stream import Stream, find_stream
from leap_dist.models.structures import Block, Stack
from leap_dist.models.views import Owners


@dataclass(frozen=True)
class Parts:
    """All that can leave a model: dimensions of its residual stream, whole layers, and the units of blocks.

    results, depth: what a layer returns, and the keys of its config for layers (`FamilyConfig`).
    """

    stream: Stream | None
    stacks: list[Stack]
    blocks: list[Block]
    results: tuple[str, ...]
    depth: tuple[str, ...]


def find_parts(model: nn.Module, family: FamilyConfig | None = None) -> Parts:
    """Everything that can leave a model."""
    table = family or family_of(model)
    results, depth = (table.results, table.depth) if table else ((), ())
    stream, stacks, blocks = find_stream(model, family), find_stacks(model, family), find_blocks(model, family)
    return Parts(stream, stacks, blocks, results, depth)


def find_stacks(model: nn.Module, family: FamilyConfig | None = None) -> list[Stack]:
    """The lists of layers of a model, in its order; empty where none is known, or one layer serves several depths.

    A layer takes all its tensors along, norms too: what is left then returns its input (norms.py where a norm follows
    the sum). One that other layers need, or whose tensors others share, is no unit.
    """
    table = family or family_of(model)
    if table is None or table.shared:
        return []
    modules = dict(model.named_modules())
    counted, shapes, owners = set(prunable_matrices(model, family)), tensor_shapes(model), Owners(model)
    needed = {block.layer for block in find_blocks(model, family) if is_anchored(block, modules)}
    found = []
    key, patterns = ("whole", table.whole) if table.whole else ("layers", table.layers)
    for name, layers in _lists(layer_paths(modules, patterns, family is not None, key)):
        tensors = [{t: t in counted for t in shapes if t.startswith(f"{layer}.")} for layer in layers]
        beside = f"{name.rpartition('.')[0]}.{table.after_first}".removeprefix(".")
        units = [
            index
            for index, (layer, own) in enumerate(zip(layers, tensors, strict=True))
            if any(own.values())
            and not any(is_inside(path, {layer}) for path in needed)
            and all(owner.path.startswith(f"{layer}.") for tensor in own for owner in owners.of(tensor))
            and not (index == 0 and beside in modules)
            and (adds(modules[layer], table) or _can_pass(modules[layer]))
        ]
        if len(layers) == len(list(modules[name].children())):
            found.append(Stack(name, tuple(layers), tuple(units), tuple(tensors)))
    return found


def adds(layer: nn.Module, table: FamilyConfig) -> bool:
    """Whether a layer whose blocks give nothing returns its input."""
    return table.adds if isinstance(table.adds, bool) else bool(attrgetter(table.adds)(layer))


def _can_pass(layer: nn.Module) -> bool:
    """Whether its norms have weights, which say that they are to pass what they are given."""
    return all(getattr(module, "weight", None) is not None for module in layer.modules() if is_layer_norm(module))


def _lists(paths: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Layers by the list that holds them."""
    lists: dict[str, list[str]] = {}
    for path in paths:
        lists.setdefault(path.rpartition(".")[0], []).append(path)
    yield from lists.items()


def left_out(stacks: Sequence[Stack], kept: Mapping[str, Collection[int]]) -> set[str]:
    """The paths of the layers that are gone; a list that `kept` does not name is whole."""
    cut = [stack for stack in stacks if stack.name in kept]
    return {path for stack in cut for index, path in enumerate(stack.layers) if index not in kept[stack.name]}


def is_inside(path: str, layers: Collection[str]) -> bool:
    """Whether a module is one of the layers, or part of one."""
    return any(f"{path}.".startswith(f"{layer}.") for layer in layers)


class Renumbered:
    """The names of tensors and modules in a model that has only the layers that are left."""

    def __init__(self, kept: Mapping[str, Sequence[int]]) -> None:
        """kept: by the path of a list of layers, the indices of those left."""
        self._kept = {path: {index: place for place, index in enumerate(left)} for path, left in kept.items()}

    def __call__(self, name: str) -> str | None:
        """The new name; None for what is in a layer that left."""
        for match in re.finditer(r"\.(\d+)(?=\.|$)", name):
            path = name[: match.start()]
            if path in self._kept:
                place = self._kept[path].get(int(match[1]))
                return None if place is None else f"{path}.{place}{name[match.end() :]}"
        return name
