"""One layer of a model, in which the names of a family's table are looked up."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from torch import nn

from leap_dist.config.family import AttentionFamily, ExpertsFamily, FfnFamily
from leap_dist.config.section import nearest
from leap_dist.errors import UserError
from leap_dist.models.families import is_conv1d
from leap_dist.models.structures import BlockFamily, UnitRun


@dataclass(frozen=True)
class Layer:
    """One layer of a model, in which names are looked up. strict: the names are the user's."""

    path: str
    index: int
    modules: Mapping[str, nn.Module]
    shapes: Mapping[str, tuple[int, ...]]
    strict: bool

    def full(self, name: str) -> str:
        """The path from the model's root of a name of the table; that of the layer itself for an empty one."""
        return f"{self.path}.{name}" if name else self.path

    def missing(self, entry: BlockFamily) -> tuple[str, str] | None:
        """The first field of a block whose name this layer does not have, and that name."""
        if self.full(entry.module) not in self.modules:
            return "module", entry.module
        for field, name in _projections(entry).items():
            if name is not None and f"{self.full(name)}.weight" not in self.shapes:
                return field, name
        tensors = entry.tensors if isinstance(entry, ExpertsFamily) else ()
        return next((("tensors", name) for name in tensors if self.full(name) not in self.shapes), None)

    def problem(self, key: str, entry: BlockFamily) -> str:
        """What to say about a block that no layer has."""
        wrong = self.missing(entry)
        assert wrong is not None
        field, name = wrong
        cut = len(self.path) + 1
        tensors = [name[cut:] for name in self.shapes if name.startswith(f"{self.path}.")]
        modules = [name[cut:] for name in self.modules if name.startswith(f"{self.path}.")]
        weights = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
        what, names = {"module": ("module", modules), "tensors": ("tensor", tensors)}.get(
            field, ("module with a weight", weights)
        )
        near = nearest(name, names)
        allowed = f"; allowed: {', '.join(names)}" if not near else ""
        return f'{key}.{field}: got "{name}"; {self.path} and its like have no such {what}{allowed}{near}'

    def width(self, name: str) -> int:
        """How many outputs a module has."""
        return self.shapes[f"{self.full(name)}.weight"][self.out_axis(name)]

    def inputs(self, name: str) -> int:
        return self.shapes[f"{self.full(name)}.weight"][1 - self.out_axis(name)]

    def rows(self, name: str, size: int, start: int = 0) -> tuple[UnitRun, ...]:
        """The outputs of a module with its bias, or a vector's elements; nothing where the name does not exist."""
        full = self.full(name)
        parts = []
        if f"{full}.weight" in self.shapes:
            parts.append(UnitRun(f"{full}.weight", self.out_axis(name), start, size))
        vectors = (vector for vector in (f"{full}.bias", full) if vector in self.shapes)
        return (*parts, *(UnitRun(vector, 0, start, size, counted=False) for vector in vectors))

    def columns(self, name: str, size: int) -> tuple[UnitRun, ...]:
        """The inputs of a module."""
        return (UnitRun(f"{self.full(name)}.weight", 1 - self.out_axis(name), 0, size),)

    def bias(self, name: str) -> tuple[str, ...]:
        bias = f"{self.full(name)}.bias"
        return (bias,) if bias in self.shapes else ()

    def out_axis(self, name: str) -> int:
        """The axis of a module's weight that counts its outputs."""
        return 1 if is_conv1d(self.modules[self.full(name)]) else 0

    def attribute(self, key: str, path: str) -> int | None:
        """The integer at a path of attributes; None where a built-in table names one that is not there."""
        try:
            value = attrgetter(path)(self.modules[self.path])
        except AttributeError as error:
            if not self.strict:
                return None
            raise UserError(f'{key}: got "{path}"; {self.path} has no such attribute: {error}') from error
        if not isinstance(value, int):
            raise UserError(f'{key}: got "{path}"; {self.path} holds {value!r} there; allowed: an integer')
        return value


def layer_paths(names: Iterable[str], patterns: Sequence[str], strict: bool, key: str = "layers") -> list[str]:
    """The module paths that the patterns of a key of the table give, in the model's order."""
    names = [name for name in names if name]
    found: set[str] = set()
    for pattern in patterns:
        expression = pattern[3:] if pattern.startswith("re:") else re.escape(pattern)
        matched = {name for name in names if re.fullmatch(expression, name)}
        if strict and not matched:
            near = nearest(pattern, names)
            examples = ", ".join(names[-3:])
            raise UserError(f"family.{key}: {pattern!r} matches no whole module path; paths look like {examples}{near}")
        found |= matched
    return [name for name in names if name in found]


def _projections(entry: BlockFamily) -> dict[str, str | None]:
    """The fields of a block that name modules with a weight."""
    if isinstance(entry, AttentionFamily):
        return {key: getattr(entry, key) for key in ("query", "key", "value", "qkv", "output")}
    if isinstance(entry, FfnFamily):
        return {key: getattr(entry, key) for key in ("up", "gate", "gate_up", "down")}
    return {"router": entry.router}
