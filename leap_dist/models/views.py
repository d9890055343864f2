"""How gates see a tensor: as outputs and inputs of the modules that own it, by their types, not by shape alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd

from leap_dist.errors import UserError
from leap_dist.models.families import is_conv1d

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
Shape = tuple[int, ...]


class View(NamedTuple):
    """A tensor as (outputs, inputs), or a stack of such matrices; `transposed`: as (inputs, outputs).

    kernel: elements of the tensor, neighbours in memory, that stand for one entry: the window of a convolution.
    """

    shape: Shape
    kernel: int = 1
    transposed: bool = False


class Owner(NamedTuple):
    """A module that holds a parameter, and the parameter's name in it."""

    path: str
    module: nn.Module
    local: str


class Owners:
    """The modules that own each parameter of a model; a shared one has several. Tensors go by their first name."""

    def __init__(self, model: nn.Module) -> None:
        self._first = {id(p): name for name, p in model.named_parameters()}
        self._owners: dict[str, list[Owner]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            for local, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                self._owners.setdefault(self._first[id(parameter)], []).append(Owner(path, module, local))

    def of(self, name: str) -> list[Owner]:
        """The modules that own a parameter."""
        return self._owners[name]

    def shape(self, name: str) -> Shape:
        """A parameter's shape, whole also where ZeRO-3 holds a part."""
        owner = self._owners[name][0]
        parameter = getattr(owner.module, owner.local)
        return tuple(getattr(parameter, "ds_shape", parameter.shape))

    def names(self) -> dict[str, str]:
        """The first name of every parameter, by each of its names."""
        return {_join(o.path, o.local): first for first, owners in self._owners.items() for o in owners}

    def view(self, name: str, shape: Shape, granularity: str) -> View:
        """How a gate of this granularity sees a tensor of this (whole) shape; single weights need no rows or columns.

        Raises UserError for what is no matrix, and where owners see the tensor in different ways.
        """
        seen = {_view(owner.module, shape) for owner in self._owners[name]} if math.prod(shape) else {"has no elements"}
        views = [view for view in seen if isinstance(view, View)]
        if len(views) == 1 or (views and granularity == "element"):
            return views[0]
        if not views:
            why = " and ".join(sorted(map(str, seen)))
            raise UserError(f"leap.gates: {granularity!r} needs matrices, but {name} {why}; name it in leap.exclude")
        users = ", ".join(
            f"{owner.path or 'the model'} ({type(owner.module).__name__})" for owner in self._owners[name]
        )
        raise UserError(
            f"leap.gates: {granularity!r} does not fit {name}, which is shared by {users}: they have other rows and "
            "columns; choose element, or name it in leap.exclude"
        )

    def biases(self, name: str, length: int, shapes: Mapping[str, Shape]) -> Iterator[str]:
        """Those among `shapes` that have an entry for each of the tensor's outputs, and follow them."""
        found = {}
        for owner in self._owners[name]:
            bias = getattr(owner.module, owner.local.replace("weight", "bias", 1), None)
            first = self._first.get(id(bias))
            if "weight" in owner.local and first is not None and shapes.get(first) == (length,):
                found[first] = True
        yield from found


def _view(module: nn.Module, shape: Shape) -> View | str:
    """What a module's type says of its tensor, or why no gate covers it."""
    if isinstance(module, _ConvNd):
        rows, cols, groups = shape[0], shape[1], module.groups
        matrix = (rows, cols) if groups == 1 else (groups, rows // groups, cols)
        return View(matrix, math.prod(shape[2:]), module.transposed)
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and (module.sparse or module.max_norm is not None):
        return f"is an embedding with {'sparse gradients' if module.sparse else 'max_norm'}, which no gate covers"
    if isinstance(module, NORMS):
        return f"belongs to a {type(module).__name__}"
    if isinstance(module, nn.Bilinear):
        return View(shape[:2], shape[2])
    if len(shape) not in (2, 3):
        return f"has shape {shape}"
    if len(shape) == 3 and hasattr(module, "kernel_size"):
        return (
            f"belongs to a {type(module).__name__}, which is not a convolution of torch.nn: its channels are not known"
        )
    return View(shape, transposed=is_conv1d(module) or (len(shape) == 3 and are_transposed(module)))


def are_transposed(experts: nn.Module) -> bool:
    """Whether fused experts are stacks of (inputs, outputs): transformers says so, or the first one's inputs are the
    width that the second one gives."""
    if (said := getattr(experts, "is_transposed", None)) is not None:
        return bool(said)
    shapes = [
        tuple(getattr(p, "ds_shape", p.shape))
        for name in ("gate_up_proj", "down_proj")
        if (p := getattr(experts, name, None)) is not None
    ]
    return len(shapes) == 2 and shapes[0][1] == shapes[1][2]


def _join(path: str, local: str) -> str:
    return f"{path}.{local}" if path else local
