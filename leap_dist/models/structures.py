"""Structures: the units of a transformer that can leave it for good, and where they lie in its tensors.

A structure is one attention, FFN or mixture-of-experts block. Its units (heads, neurons, experts) each cover a run of
indices along one axis of several tensors. One table serves both ends: gates mask these runs, `shrink` removes them.
blocks.py finds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from leap_dist.config.family import AttentionFamily, ExpertsFamily, FfnFamily

Kind = Literal["head", "neuron", "expert", "layer"]
BlockFamily = AttentionFamily | FfnFamily | ExpertsFamily


@dataclass(frozen=True)
class UnitRun:
    """Unit u covers the indices [start + u * size, start + (u + 1) * size) along `axis` of `tensor`.

    `tensor` is a name of model.named_parameters(). `counted` is False for biases and routers: they follow their unit,
    but are no prunable weights. All parts of a structure in one tensor together cover it whole.
    """

    tensor: str
    axis: int
    start: int
    size: int
    counted: bool = True


@dataclass(frozen=True)
class Resize:
    """After a removal, `attribute` of the module becomes `per_unit` times the number of units left."""

    module: str
    attribute: str
    per_unit: int


@dataclass(frozen=True)
class Structure:
    """One block of a model: `name` is the path of its module, `role` groups blocks that are alike ("attention", ...).

    A block that has no module of its own is named by its layer and its role ("bert.encoder.layer.0.ffn").
    A structure of kind "layer" has one unit, which covers all weights and biases of a sublayer.
    """

    kind: Kind
    name: str
    role: str
    num_units: int
    parts: tuple[UnitRun, ...]
    resizes: tuple[Resize, ...] = ()


@dataclass(frozen=True)
class Stack:
    """A list of layers, of which those in `units` can leave whole; `name` is its path.

    layers: the paths of all of them. tensors: for each its tensors, and whether their elements are prunable weights.
    """

    name: str
    layers: tuple[str, ...]
    units: tuple[int, ...]
    tensors: tuple[dict[str, bool], ...]

    @property
    def needed(self) -> tuple[int, ...]:
        """The layers that stay."""
        return tuple(index for index in range(len(self.layers)) if index not in self.units)


@dataclass(frozen=True)
class Span:
    """Unit u covers the indices [start + u * step, start + u * step + size) along `axis` of `tensor`."""

    tensor: str
    axis: int
    start: int
    size: int
    step: int


@dataclass(frozen=True)
class Block:
    """A structure with what removing its units takes.

    layer, index: the path of its layer, and the layer's place among those that `table.layers` gives.
    silent: a unit whose elements are all zero in one of these groups of spans has no influence.
    biases: tensors of the block that no unit covers.
    """

    structure: Structure
    layer: str
    index: int
    table: BlockFamily
    silent: tuple[tuple[Span, ...], ...]
    biases: tuple[str, ...] = ()

    def path(self, name: str) -> str:
        """The full path of a name of the table."""
        return f"{self.layer}.{name}"
