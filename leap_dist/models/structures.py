"""Structures: the units of a transformer that can leave it for good, and where they lie in its tensors.

A structure is one attention, FFN or mixture-of-experts block. Its units (heads, neurons, experts) each cover a run of
indices along one axis of several tensors. One table serves both ends: gates mask these runs, `shrink` removes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

import torch
from torch import nn

from leap_dist.config.family import AttentionFamily, ExpertsFamily, FamilyConfig, FfnFamily
from leap_dist.config.section import nearest
from leap_dist.errors import UserError
from leap_dist.models.families import family_of, is_conv1d

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


def find_structures(model: nn.Module, family: FamilyConfig | None = None) -> list[Structure]:
    """Structures of kind head, neuron and expert, in the order of the model's parameters.

    Empty for an architecture that is in no table, if no `family` describes it.
    Raises UserError if `family` names what the model does not have.
    """
    return [block.structure for block in find_blocks(model, family)]


def find_sublayers(model: nn.Module, family: FamilyConfig | None = None) -> list[Structure]:
    """Structures of kind layer: the blocks that can leave as a whole, output bias included, norms excluded.

    A layer whose weights serve several depths has none; nor has a block whose result other layers need.
    """
    table = family or family_of(model)
    if table is None or table.shared:
        return []
    shapes, modules = tensor_shapes(model), dict(model.named_modules())
    blocks = [block for block in find_blocks(model, family) if not is_anchored(block, modules)]
    return [_sublayer(block, shapes) for block in blocks]


def tensor_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters, whole also where ZeRO-3 holds a part."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}


def is_anchored(block: Block, modules: Mapping[str, nn.Module]) -> bool:
    """Whether other layers need this block."""
    anchor = block.table.anchor if isinstance(block.table, AttentionFamily) else None
    return anchor is not None and block.path(anchor) in modules


def find_blocks(model: nn.Module, family: FamilyConfig | None = None) -> list[Block]:
    """As `find_structures`, each with what its removal takes."""
    table = family or family_of(model)
    if table is None:
        return []
    shapes, modules = tensor_shapes(model), dict(model.named_modules())
    layers = [
        _Layer(path, index, modules, shapes, strict=family is not None)
        for index, path in enumerate(_layer_paths(modules, table.layers, strict=family is not None))
    ]
    blocks: list[Block] = []
    sections: dict[str, tuple[BlockFamily, ...]] = {key: getattr(table, key) for key in ("attention", "ffn", "experts")}
    for section, entries in sections.items():
        for number, entry in enumerate(entries):
            key = f"family.{section}[{number}]"
            found = [layer for layer in layers if not layer.missing(entry)]
            if not found and family is not None:
                raise UserError(layers[0].problem(key, entry))
            blocks += [block for layer in found for block in layer.blocks(key, entry)]
    order = {name: place for place, name in enumerate(shapes)}
    return sorted(blocks, key=lambda block: min(order[part.tensor] for part in block.structure.parts))


# ---------------------------------------------------------------------------------------------- finding


def _layer_paths(names: Iterable[str], patterns: Sequence[str], strict: bool) -> list[str]:
    """The module paths that the patterns give, in the model's order."""
    names = [name for name in names if name]
    found: set[str] = set()
    for pattern in patterns:
        expression = pattern[3:] if pattern.startswith("re:") else re.escape(pattern)
        matched = {name for name in names if re.fullmatch(expression, name)}
        if strict and not matched:
            near = nearest(pattern, names)
            examples = ", ".join(names[-3:])
            raise UserError(
                f"family.layers: {pattern!r} matches no whole module path; paths look like {examples}{near}"
            )
        found |= matched
    return [name for name in names if name in found]


def _projections(entry: BlockFamily) -> dict[str, str | None]:
    """The fields of a block that name modules with a weight."""
    if isinstance(entry, AttentionFamily):
        return {key: getattr(entry, key) for key in ("query", "key", "value", "qkv", "output")}
    if isinstance(entry, FfnFamily):
        return {key: getattr(entry, key) for key in ("up", "gate", "gate_up", "down")}
    return {"router": entry.router}


@dataclass(frozen=True)
class _Layer:
    """One layer of a model, in which names are looked up. strict: the names are the user's."""

    path: str
    index: int
    modules: Mapping[str, nn.Module]
    shapes: Mapping[str, tuple[int, ...]]
    strict: bool

    def full(self, name: str) -> str:
        return f"{self.path}.{name}" if name else self.path

    def blocks(self, key: str, entry: BlockFamily) -> Iterator[Block]:
        """The block that an entry describes, or nothing where its heads are mixed."""
        if isinstance(entry, AttentionFamily):
            if entry.unless is None or self.full(entry.unless) not in self.modules:
                yield self._attention(key, entry)
        elif isinstance(entry, FfnFamily):
            yield self._ffn(key, entry)
        else:
            yield self._experts(key, entry)

    # ------------------------------------------------------------------------------ what is there

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
        return self.shapes[f"{self.full(name)}.weight"][self._out(name)]

    def inputs(self, name: str) -> int:
        return self.shapes[f"{self.full(name)}.weight"][1 - self._out(name)]

    def rows(self, name: str, size: int, start: int = 0) -> tuple[UnitRun, ...]:
        """The outputs of a module with its bias, or a vector's elements; nothing where the name does not exist."""
        full = self.full(name)
        parts = []
        if f"{full}.weight" in self.shapes:
            parts.append(UnitRun(f"{full}.weight", self._out(name), start, size))
        vectors = (vector for vector in (f"{full}.bias", full) if vector in self.shapes)
        return (*parts, *(UnitRun(vector, 0, start, size, counted=False) for vector in vectors))

    def columns(self, name: str, size: int) -> tuple[UnitRun, ...]:
        """The inputs of a module."""
        return (UnitRun(f"{self.full(name)}.weight", 1 - self._out(name), 0, size),)

    def bias(self, name: str) -> tuple[str, ...]:
        bias = f"{self.full(name)}.bias"
        return (bias,) if bias in self.shapes else ()

    def _out(self, name: str) -> int:
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

    # ------------------------------------------------------------------------------ the three kinds

    def _attention(self, key: str, entry: AttentionFamily) -> Block:
        size = (
            entry.head_size if isinstance(entry.head_size, int) else self.attribute(f"{key}.head_size", entry.head_size)
        )
        heads, rest = divmod(self.inputs(entry.output), size or 0) if size else (0, 1)
        if size is None or rest:
            raise UserError(
                f"{key}.head_size: got {size}; allowed: a divisor of {self.inputs(entry.output)}, "
                f"the inputs of {self.full(entry.output)}"
            )
        if entry.layout == "interleaved" and entry.qkv is not None:
            units, parts = heads, self.rows(entry.qkv, 3 * size)
            values = [Span(p.tensor, p.axis, 2 * size, size, 3 * size) for p in parts]
        else:
            units, parts, value = self._separate(entry, heads, size)
            values = _spans(value)
        per_unit = heads // units * size if units else size
        if entry.value_bias is not None:
            values += _spans(self.rows(entry.value_bias, size))
        columns = self.columns(entry.output, per_unit)
        parts += tuple(part for name in entry.follow for part in self.rows(name, per_unit)) + columns
        structure = self._structure(key, "head", entry, units, parts)
        silent = (tuple(values), tuple(_spans(columns)))
        return Block(structure, self.path, self.index, entry, silent, self.bias(entry.output))

    def _separate(
        self, entry: AttentionFamily, heads: int, size: int
    ) -> tuple[int, tuple[UnitRun, ...], tuple[UnitRun, ...]]:
        """Units, all parts, and those of the values, where queries, keys and values are each in one run of rows."""
        if entry.qkv is not None:
            units = (self.width(entry.qkv) // size - heads) // 2
            names, starts = [entry.qkv] * 3, [0, heads * size, (heads + units) * size]
        else:
            assert entry.query is not None and entry.key is not None and entry.value is not None
            units = self.width(entry.value) // size
            names, starts = [entry.query, entry.key, entry.value], [0, 0, 0]
        sizes = [heads // units * size if units else size, size, size]
        query, key, value = (self.rows(*where) for where in zip(names, sizes, starts, strict=True))
        return units, query + key + value, value

    def _ffn(self, key: str, entry: FfnFamily) -> Block:
        units = self.inputs(entry.down)
        if entry.gate_up is not None:
            gate, up = self.rows(entry.gate_up, 1), self.rows(entry.gate_up, 1, start=units)
        else:
            assert entry.up is not None
            gate, up = self.rows(entry.gate, 1) if entry.gate is not None else (), self.rows(entry.up, 1)
        columns = self.columns(entry.down, 1)
        structure = self._structure(key, "neuron", entry, units, (*gate, *up, *columns))
        silent = [columns]
        if gate:
            silent.append(up)
        if self._keeps_zero(key, entry.activation):
            silent.append(gate or up)
        groups = tuple(tuple(_spans(group)) for group in silent)
        return Block(structure, self.path, self.index, entry, groups, self.bias(entry.down))

    def _keeps_zero(self, key: str, activation: str | None) -> bool:
        """Whether the activation of 0 is 0."""
        if activation is None:
            return False
        try:
            function = attrgetter(activation)(self.modules[self.path])
        except AttributeError as error:
            raise UserError(
                f'{key}.activation: got "{activation}"; {self.path} has no such attribute: {error}'
            ) from error
        return bool(function(torch.zeros(1)).item() == 0.0)

    def _experts(self, key: str, entry: ExpertsFamily) -> Block:
        router = f"{self.full(entry.router)}.weight"
        units = self.shapes[router][0]
        parts = (
            UnitRun(router, 0, 0, 1, counted=False),
            *(UnitRun(self.full(name), 0, 0, 1) for name in entry.tensors),
        )
        structure = self._structure(key, "expert", entry, units, parts)
        return Block(structure, self.path, self.index, entry, (tuple(_spans(parts)),))

    def _structure(self, key: str, kind: Kind, entry: BlockFamily, units: int, parts: tuple[UnitRun, ...]) -> Structure:
        covered: dict[tuple[str, int], int] = {}
        for part in parts:
            place = (part.tensor, part.axis)
            covered[place] = covered.get(place, 0) + part.size * units
        for (tensor, axis), length in covered.items():
            if self.shapes[tensor][axis] != length:
                raise UserError(
                    f"{key}: {units} units of a {entry.role} block cover {length} indices of axis {axis} of {tensor}, "
                    f"which has {self.shapes[tensor][axis]}; check the names and head_size"
                )
        name = self.full(entry.module) if entry.module else f"{self.path}.{entry.role}"
        return Structure(kind, name, entry.role, units, parts, tuple(self._resizes(key, entry, units)))

    def _resizes(self, key: str, entry: BlockFamily, units: int) -> Iterator[Resize]:
        for path in entry.resize:
            value = self.attribute(f"{key}.resize", path)
            if value is None:
                continue
            if units and value % units:
                raise UserError(f'{key}.resize: got "{path}", which is {value}; allowed: a multiple of {units} units')
            holder, _, attribute = path.rpartition(".")
            if holder == "config" or holder.endswith(".config"):
                holder, attribute = holder.removesuffix("config").removesuffix("."), f"config.{attribute}"
            yield Resize(self.full(holder), attribute, value // units if units else 0)


def _spans(parts: Iterable[UnitRun]) -> list[Span]:
    return [Span(part.tensor, part.axis, part.start, part.size, part.size) for part in parts]


def _sublayer(block: Block, shapes: Mapping[str, tuple[int, ...]]) -> Structure:
    """The whole block as one unit."""
    counted = {part.tensor: part.counted for part in block.structure.parts} | dict.fromkeys(block.biases, False)
    parts = tuple(UnitRun(tensor, 0, 0, shapes[tensor][0], flag) for tensor, flag in counted.items())
    return Structure("layer", block.structure.name, block.structure.role, 1, parts)
