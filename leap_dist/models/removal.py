"""Taking units out of a model in place, and what stands where a block lost all of them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from leap_dist.config.family import AttentionFamily, ExpertsFamily, FfnFamily
from leap_dist.models.families import is_conv1d
from leap_dist.models.stacks import Parts, is_inside, left_out
from leap_dist.models.stream import NAME as STREAM
from leap_dist.models.stream import narrow_
from leap_dist.models.structures import Block, Resize, UnitRun


def remove_(model: nn.Module, parts: Parts, kept: Mapping[str, Sequence[int]]) -> None:
    """Leave only the units that `kept` says, ascending; by "stream", and by the name of their stack or structure."""
    gone = left_out(parts.stacks, kept)
    if parts.stream is not None and STREAM in kept:
        narrow_(model, parts.stream, kept[STREAM], parts.blocks)
    for path in gone:
        model.set_submodule(path, NoLayer(model.get_submodule(path), parts.results))
    _remove_units_(model, [block for block in parts.blocks if not is_inside(block.layer, gone)], kept)


def _remove_units_(model: nn.Module, blocks: Iterable[Block], kept: Mapping[str, Sequence[int]]) -> None:
    """Leave only the units `kept[structure name]` of each block, ascending; one with all its units stays as it is."""
    experts: list[int] = []
    for block in blocks:
        units = list(kept[block.structure.name])
        if len(units) < block.structure.num_units:
            _cut_tensors(model, block.structure.parts, units)
            for resize in block.structure.resizes:
                _resize(model.get_submodule(resize.module), resize, len(units))
            _finish(model, block, units)
        if isinstance(block.table, ExpertsFamily) and units:
            experts.append(len(units))
    if experts:
        _tell_balance_loss(model, experts)


def _cut_tensors(model: nn.Module, parts: Iterable[UnitRun], units: Sequence[int]) -> None:
    """Select the kept indices of every tensor; the sizes that linear layers remember follow."""
    places: dict[tuple[str, int], list[UnitRun]] = {}
    for part in parts:
        places.setdefault((part.tensor, part.axis), []).append(part)
    for (tensor, axis), runs in places.items():
        parameter = model.get_parameter(tensor)
        index = torch.cat([_indices(part, units) for part in sorted(runs, key=lambda part: part.start)])
        parameter.data = parameter.data.index_select(axis, index.to(parameter.device))
        parameter.grad = None
    for path in {part.tensor.rpartition(".")[0] for part in parts}:
        module = model.get_submodule(path)
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif is_conv1d(module):
            module.nx, module.nf = module.weight.shape  # type: ignore[assignment, misc]


def _indices(part: UnitRun, units: Sequence[int]) -> torch.Tensor:
    starts = torch.tensor(units, dtype=torch.long)[:, None] * part.size + part.start
    return (starts + torch.arange(part.size)).flatten()


def _resize(module: nn.Module, resize: Resize, num_units: int) -> None:
    """Set the attribute; one of the config is set on a copy that the module alone has."""
    target, attribute = module, resize.attribute
    if attribute.startswith("config."):
        target = module.config = copy.deepcopy(module.config)  # type: ignore[assignment]
        attribute = attribute.removeprefix("config.")
    setattr(target, attribute, resize.per_unit * num_units)


def _finish(model: nn.Module, block: Block, units: list[int]) -> None:
    """What the block needs beyond smaller tensors: stand-ins where nothing is left, hooks, fewer experts a token."""
    table = block.table
    if isinstance(table, AttentionFamily):
        attention = model.get_submodule(block.path(table.module))
        if not units:
            _replace_input(model, block.path(table.output))
            output, norm = (_inside(model, block, name) for name in (table.output, table.norm))
            stub = NoHeads(output, norm, getattr(attention, "layer_idx", None), table.position_bias)
            model.set_submodule(block.path(table.module), stub)
        elif table.position_bias:
            _select_position_bias(attention, units, table, block)
    elif isinstance(table, FfnFamily):
        if not units:
            _replace_input(model, block.path(table.down))
            for name in {table.up, table.gate, table.gate_up} - {None}:
                model.set_submodule(block.path(str(name)), NoOutput())
    elif not units:
        model.set_submodule(block.path(table.module), NoExperts())
    else:
        for path in table.top_k:
            holder, _, attribute = block.path(path).rpartition(".")
            module = model.get_submodule(holder)
            setattr(module, attribute, min(getattr(module, attribute), len(units)))


def _inside(model: nn.Module, block: Block, name: str | None) -> nn.Module | None:
    """The module of that name if it is part of the block's own."""
    if name is None or not name.startswith(f"{block.table.module}."):
        return None
    return model.get_submodule(block.path(name))


def _tell_balance_loss(model: nn.Module, experts: list[int]) -> None:
    """Models for language keep two numbers of their own for the loss that balances experts."""
    if isinstance(getattr(model, "num_experts", None), int):
        model.num_experts = max(experts)  # type: ignore[assignment]
    if isinstance(getattr(model, "num_experts_per_tok", None), int):
        model.num_experts_per_tok = min(model.num_experts_per_tok, *experts)  # type: ignore[assignment, type-var]


# ---------------------------------------------------------------------------------------------- stand-ins


class NoLayer(nn.Module):
    """A layer that left: what it is given, and what it hands on to the next one."""

    def __init__(self, layer: nn.Module, results: Sequence[str]) -> None:
        super().__init__()
        self._signature, self._results = inspect.signature(type(layer).forward), tuple(results)
        indices = (getattr(module, "layer_idx", None) for module in layer.modules())
        self._layer_index = next((index for index in indices if index is not None), None)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor | None, ...]:
        """The hidden states alone, or first of a tuple, as the layer returned them."""
        bound = self._signature.bind(self, *args, **kwargs).arguments
        given = bound | bound.get("kwargs", {})
        count_tokens(given["hidden_states"], given, self._layer_index)
        if not self._results:
            return given["hidden_states"]
        return given["hidden_states"], *(given.get(name) for name in self._results)


class NoHeads(nn.Module):
    """An attention module that lost all its heads: what its output bias gives, and no attention weights."""

    def __init__(
        self, output: nn.Module | None, norm: nn.Module | None, layer_index: int | None, position_bias: bool
    ) -> None:
        super().__init__()
        self.output, self.norm = output, norm
        self.layer_index, self.position_bias = layer_index, position_bias

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor | None, ...]:
        """(result, None), or (result, the position bias it was given, None)."""
        result = hidden_states.new_zeros(*hidden_states.shape[:-1], 0)
        if self.output is not None:
            result = self.output(result)
        if self.norm is not None:
            result = self.norm(hidden_states + result)
        if not any(kwargs.get(key) is not None for key in ("key_value_states", "encoder_hidden_states")):
            count_tokens(hidden_states, kwargs, self.layer_index)
        return (result, kwargs.get("position_bias"), None) if self.position_bias else (result, None)


def count_tokens(hidden_states: torch.Tensor, arguments: Mapping[str, Any], layer_index: int | None) -> None:
    """A cache learns how long the text is from its layers: give it one number a token."""
    cache = arguments.get("cache", arguments.get("past_key_values"))
    if cache is not None and layer_index is not None:
        cache = getattr(cache, "self_attention_cache", cache)
        nothing = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
        cache.update(nothing, nothing, layer_index)


class NoInput(nn.Module):
    """A linear layer that lost all its inputs: its bias at every position."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, width: int) -> None:
        super().__init__()
        self.weight, self.bias, self.width = weight, bias, width  # T5 asks the weight for its dtype

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        result = hidden_states.new_zeros(*hidden_states.shape[:-1], self.width)
        return result if self.bias is None else result + self.bias


class NoOutput(nn.Module):
    """A linear layer that lost all its outputs."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.new_zeros(*hidden_states.shape[:-1], 0)


class NoExperts(nn.Module):
    """A mixture-of-experts block that lost all its experts."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


def _replace_input(model: nn.Module, path: str) -> None:
    linear = model.get_submodule(path)
    weight = linear.weight
    assert isinstance(weight, nn.Parameter) and weight.numel() == 0
    model.set_submodule(path, NoInput(weight, linear.bias, max(weight.shape)))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- position bias


class KeptHeads:
    """Hooks of an attention module that is given a position bias (batch, heads, queries, keys) of all heads.

    The module sees the part of its own heads, and the bias of all heads is passed to the next one. A bias that the
    module makes from a table passes through here too: the table stays whole.
    """

    def __init__(self, heads: list[int]) -> None:
        self.heads = heads
        self.whole: torch.Tensor | None = None

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.whole = kwargs.get("position_bias")
        if self.whole is not None:
            kwargs = kwargs | {"position_bias": self._select(self.whole, 1)}
        return args, kwargs

    def table(self, module: nn.Module, args: tuple[Any, ...], values: torch.Tensor) -> torch.Tensor:
        """On the table's output (queries, keys, heads)."""
        self.whole = values.permute(2, 0, 1).unsqueeze(0)
        return self._select(values, 2)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> tuple[Any, ...]:
        whole, self.whole = self.whole, None
        return (output[0], whole, *output[2:])

    def _select(self, values: torch.Tensor, axis: int) -> torch.Tensor:
        return values.index_select(axis, torch.tensor(self.heads, device=values.device))


def _select_position_bias(attention: nn.Module, units: list[int], table: AttentionFamily, block: Block) -> None:
    hooks = KeptHeads(units)
    attention.register_forward_pre_hook(hooks.before, with_kwargs=True)
    attention.register_forward_hook(hooks.after, prepend=True)  # a second removal is inside the first
    if table.anchor is not None:
        anchor = table.anchor.removeprefix(f"{table.module}.")
        for name, module in attention.named_modules():
            if name == anchor:
                module.register_forward_hook(hooks.table)
