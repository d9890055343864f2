"""Structures: the units of a transformer that can leave it for good, and where they lie in its tensors.

A structure is one attention, FFN or mixture-of-experts block. Its units (heads, neurons, experts) each cover a run of
indices along one axis of several tensors. One table serves both ends: gates mask these runs, `shrink` removes them.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["head", "neuron", "expert", "layer"]


@dataclass(frozen=True)
class Part:
    """Unit u covers the indices [start + u * size, start + (u + 1) * size) along `axis` of `tensor`.

    `tensor` is a name of model.named_parameters(). `counted` is False for biases: they follow their unit, but are no
    prunable weights. All parts of a structure in one tensor together cover it whole.
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

    A structure of kind "layer" has one unit, which covers all weights and biases of a sublayer.
    """

    kind: Kind
    name: str
    role: str
    num_units: int
    parts: tuple[Part, ...]
    resizes: tuple[Resize, ...] = ()
