"""Finding the blocks of a model by the table of its architecture: attention, feed-forward, experts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from operator import attrgetter

import torch
from torch import nn

from leap_dist.config.family import AttentionFamily, ExpertsFamily, FamilyConfig, FfnFamily
from leap_dist.config.section import nearest
from leap_dist.errors import UserError
from leap_dist.models.families import family_of
from leap_dist.models.layer import Layer, layer_paths
from leap_dist.models.structures import Block, BlockFamily, Kind, Resize, Span, Structure, UnitRun


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
        Layer(path, index, modules, shapes, strict=family is not None)
        for index, path in enumerate(layer_paths(modules, table.layers, strict=family is not None))
    ]
    if family is not None:
        _check_names(model, family, layers[0])
    blocks: list[Block] = []
    sections: dict[str, tuple[BlockFamily, ...]] = {key: getattr(table, key) for key in ("attention", "ffn", "experts")}
    for section, entries in sections.items():
        for number, entry in enumerate(entries):
            key = f"family.{section}[{number}]"
            found = [layer for layer in layers if not layer.missing(entry)]
            if not found and family is not None:
                raise UserError(layers[0].problem(key, entry))
            blocks += [block for layer in found for block in _blocks(layer, key, entry)]
    order = {name: place for place, name in enumerate(shapes)}
    return sorted(blocks, key=lambda block: min(order[part.tensor] for part in block.structure.parts))


def _check_names(model: nn.Module, family: FamilyConfig, layer: Layer) -> None:
    """Raise UserError for names that are read only once a model is made smaller: after the whole run."""
    keys = {f"family.hidden[{number}]": name for number, name in enumerate(family.hidden)}
    keys["family.epsilon"] = family.epsilon or ""
    keys |= {f"family.experts[{i}].config_top_k": own.config_top_k or "" for i, own in enumerate(family.experts)}
    config = getattr(model, "config", None)
    known = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    for key, name in keys.items():
        if name and known and not hasattr(config, name):
            raise UserError(f'{key}: got "{name}"; the config of the model has no such key{nearest(name, known)}')
    if isinstance(family.adds, str):
        paths = layer_paths(layer.modules, family.whole or family.layers, True, "whole" if family.whole else "layers")
        replace(layer, path=paths[0]).attribute("family.adds", family.adds)


def _blocks(layer: Layer, key: str, entry: BlockFamily) -> Iterator[Block]:
    """The block that an entry describes, or nothing where its heads are mixed. `key`: the entry's, for messages."""
    if isinstance(entry, AttentionFamily):
        if entry.unless is None or layer.full(entry.unless) not in layer.modules:
            yield _attention(layer, key, entry)
    elif isinstance(entry, FfnFamily):
        yield _ffn(layer, key, entry)
    else:
        yield _experts(layer, key, entry)


def _attention(layer: Layer, key: str, entry: AttentionFamily) -> Block:
    size = entry.head_size if isinstance(entry.head_size, int) else layer.attribute(f"{key}.head_size", entry.head_size)
    heads, rest = divmod(layer.inputs(entry.output), size or 0) if size else (0, 1)
    if size is None or rest:
        raise UserError(
            f"{key}.head_size: got {size}; allowed: a divisor of {layer.inputs(entry.output)}, "
            f"the inputs of {layer.full(entry.output)}"
        )
    if entry.layout == "interleaved" and entry.qkv is not None:
        units, parts = heads, layer.rows(entry.qkv, 3 * size)
        values = [Span(p.tensor, p.axis, 2 * size, size, 3 * size) for p in parts]
    else:
        units, parts, value = _separate(layer, entry, heads, size)
        values = _spans(value)
    per_unit = heads // units * size if units else size
    if entry.value_bias is not None:
        values += _spans(layer.rows(entry.value_bias, size))
    columns = layer.columns(entry.output, per_unit)
    parts += tuple(part for name in entry.follow for part in layer.rows(name, per_unit)) + columns
    structure = _structure(layer, key, "head", entry, units, parts)
    silent = (tuple(values), tuple(_spans(columns)))
    return Block(structure, layer.path, layer.index, entry, silent, layer.bias(entry.output))


def _separate(
    layer: Layer, entry: AttentionFamily, heads: int, size: int
) -> tuple[int, tuple[UnitRun, ...], tuple[UnitRun, ...]]:
    """Units, all parts, and those of the values, where queries, keys and values are each in one run of rows."""
    if entry.qkv is not None:
        units = (layer.width(entry.qkv) // size - heads) // 2
        names, starts = [entry.qkv] * 3, [0, heads * size, (heads + units) * size]
    else:
        assert entry.query is not None and entry.key is not None and entry.value is not None
        units = layer.width(entry.value) // size
        names, starts = [entry.query, entry.key, entry.value], [0, 0, 0]
    sizes = [heads // units * size if units else size, size, size]
    query, key, value = (layer.rows(*where) for where in zip(names, sizes, starts, strict=True))
    return units, query + key + value, value


def _ffn(layer: Layer, key: str, entry: FfnFamily) -> Block:
    units = layer.inputs(entry.down)
    if entry.gate_up is not None:
        gate, up = layer.rows(entry.gate_up, 1), layer.rows(entry.gate_up, 1, start=units)
    else:
        assert entry.up is not None
        gate, up = layer.rows(entry.gate, 1) if entry.gate is not None else (), layer.rows(entry.up, 1)
    columns = layer.columns(entry.down, 1)
    structure = _structure(layer, key, "neuron", entry, units, (*gate, *up, *columns))
    silent = [columns]
    if gate:
        silent.append(up)
    if _keeps_zero(layer, key, entry.activation):
        silent.append(gate or up)
    groups = tuple(tuple(_spans(group)) for group in silent)
    return Block(structure, layer.path, layer.index, entry, groups, layer.bias(entry.down))


def _keeps_zero(layer: Layer, key: str, activation: str | None) -> bool:
    """Whether the activation of 0 is 0."""
    if activation is None:
        return False
    try:
        function = attrgetter(activation)(layer.modules[layer.path])
    except AttributeError as error:
        raise UserError(f'{key}.activation: got "{activation}"; {layer.path} has no such attribute: {error}') from error
    return bool(function(torch.zeros(1)).item() == 0.0)


def _experts(layer: Layer, key: str, entry: ExpertsFamily) -> Block:
    for path in entry.top_k:
        layer.attribute(f"{key}.top_k", path)
    router = f"{layer.full(entry.router)}.weight"
    units = layer.shapes[router][0]
    parts = (
        UnitRun(router, 0, 0, 1, counted=False),
        *(UnitRun(layer.full(name), 0, 0, 1) for name in entry.tensors),
    )
    structure = _structure(layer, key, "expert", entry, units, parts)
    return Block(structure, layer.path, layer.index, entry, (tuple(_spans(parts)),))


def _structure(
    layer: Layer, key: str, kind: Kind, entry: BlockFamily, units: int, parts: tuple[UnitRun, ...]
) -> Structure:
    covered: dict[tuple[str, int], int] = {}
    for part in parts:
        place = (part.tensor, part.axis)
        covered[place] = covered.get(place, 0) + part.size * units
    for (tensor, axis), length in covered.items():
        if layer.shapes[tensor][axis] != length:
            raise UserError(
                f"{key}: {units} units of a {entry.role} block cover {length} indices of axis {axis} of {tensor}, "
                f"which has {layer.shapes[tensor][axis]}; check the names and head_size"
            )
    name = layer.full(entry.module) if entry.module else f"{layer.path}.{entry.role}"
    return Structure(kind, name, entry.role, units, parts, tuple(_resizes(layer, key, entry, units)))


def _resizes(layer: Layer, key: str, entry: BlockFamily, units: int) -> Iterator[Resize]:
    for path in entry.resize:
        value = layer.attribute(f"{key}.resize", path)
        if value is None:
            continue
        if units and value % units:
            raise UserError(f'{key}.resize: got "{path}", which is {value}; allowed: a multiple of {units} units')
        holder, _, attribute = path.rpartition(".")
        if holder == "config" or holder.endswith(".config"):
            holder, attribute = holder.removesuffix("config").removesuffix("."), f"config.{attribute}"
        yield Resize(layer.full(holder), attribute, value // units if units else 0)


def _spans(parts: Iterable[UnitRun]) -> list[Span]:
    return [Span(part.tensor, part.axis, part.start, part.size, part.size) for part in parts]


def _sublayer(block: Block, shapes: Mapping[str, tuple[int, ...]]) -> Structure:
    """The whole block as one unit."""
    counted = {part.tensor: part.counted for part in block.structure.parts} | dict.fromkeys(block.biases, False)
    parts = tuple(UnitRun(tensor, 0, 0, shapes[tensor][0], flag) for tensor, flag in counted.items())
    return Structure("layer", block.structure.name, block.structure.role, 1, parts)
