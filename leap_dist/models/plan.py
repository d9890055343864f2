"""From a model and `leap.gates` to a plan: the list of gates."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from leap_dist.config.family import FamilyConfig
from leap_dist.config.leap import GateConfig, LeapConfig
from leap_dist.core.fixed import START, Fixed, mask_gates, unpack
from leap_dist.core.gates import Gate, GatePlan, matrix_gate
from leap_dist.core.soft import check_soft
from leap_dist.errors import UserError
from leap_dist.models.blocks import find_structures, find_sublayers, tensor_shapes
from leap_dist.models.families import computed_weights, family_of, prunable_matrices
from leap_dist.models.mask_files import read_masks
from leap_dist.models.permute import order_of
from leap_dist.models.stacks import find_stacks
from leap_dist.models.stream import find_stream, stream_of
from leap_dist.models.structures import Structure, UnitRun
from leap_dist.models.views import Owners
from leap_dist.ops.slices import Slice

STRUCTURED = ("head", "neuron", "expert", "layer", "depth", "hidden")
ALIGNED = 8  # numbers in 16 bytes of bf16: torch's grouped product takes no other rows
Shape = tuple[int, ...]


def match_names(names: Iterable[str], patterns: Sequence[str], key: str, what: str = "tensor") -> list[str]:
    """The names that a pattern gives exactly, or by `re:<regular expression>` from its start, in order.

    Raises UserError for a pattern that is no regular expression or matches nothing.
    """
    names, found = list(names), set()
    for pattern in patterns:
        try:
            matched = (
                {n for n in names if re.match(pattern[3:], n)} if pattern.startswith("re:") else {pattern} & set(names)
            )
        except re.error as error:
            raise UserError(f"{key}: {pattern!r} is not a regular expression ({error})") from None
        if not matched:
            examples = ", ".join(names[:3])
            raise UserError(f"{key}: {pattern!r} matches no {what} of the model; names look like {examples}")
        found |= matched
    return [n for n in names if n in found]


def start_plan(model: nn.Module, config: LeapConfig, family: FamilyConfig | None) -> tuple[GatePlan, Fixed | None]:
    """The gates of a model, and the masks that `leap.start` says, if it says any.

    A file of masks has gates of single weights on the tensors that it names. Raises UserError for a choice that does
    not fit the model, and for masks that are not its own.
    """
    if config.start in (None, "zeros"):
        return make_plan(model, config, family), Fixed({}, order_of(model)) if config.start else None
    key, path, shapes = START, Path(str(config.start)), tensor_shapes(model)
    fixed = read_masks(key, path, shapes, order_of(model))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if still := next((name for name in fixed.masks if name not in trained), None):
        raise UserError(f"{key}: {path} has a mask of {still}, which is not trained; call requires_grad_(True) on it")
    return GatePlan(mask_gates(fixed.masks, shapes)), fixed


def prior_of(model: nn.Module, plan: GatePlan, config: LeapConfig) -> Fixed | None:
    """The masks that `leap.prior_mask` says, if it says any, of all that has a gate.

    Raises UserError for gates that are not of single weights, and for masks that are not those of the plan's tensors.
    """
    if config.prior_mask is None:
        return None
    key, path = "leap.prior_mask", Path(config.prior_mask)
    coarse = next((gate.granularity for gate in plan.gates if not gate.elementwise), None)
    if coarse is not None:
        raise UserError(f'{key}: a mask says which single weights stay, and "{coarse}" is in leap.gates; remove one')
    prior = read_masks(key, path, tensor_shapes(model), order_of(model))
    odd = sorted(prior.masks.keys() ^ plan.covers.keys())
    if odd:
        what = "a mask in it, but no gate" if odd[0] in prior.masks else "a gate, but no mask in it"
        raise UserError(f"{key}: {path}: {odd[0]} has {what}; change leap.include or leap.exclude")
    kept = sum(int(unpack(mask, 0, plan.numel(name)).sum()) for name, mask in prior.masks.items())
    if kept in (0, plan.prunable):
        raise UserError(
            f"{key}: {path} keeps {'every weight' if kept else 'no weight'}; allowed: one that keeps a part"
        )
    return prior


def make_plan(model: nn.Module, config: LeapConfig, family: FamilyConfig | None = None) -> GatePlan:
    """Gates for every entry of `leap.gates`: one for each chosen matrix, or block of heads, neurons or experts.

    Raises UserError where nothing is chosen, or a choice does not fit the model.
    """
    _refuse_computed(model, config)
    maker = _Maker(model, config, family)
    gates: list[Gate] = []
    for number, entry in enumerate(config.gates):
        key = f"leap.gates[{number}]"
        made = maker.structured(key, entry) if entry.granularity in STRUCTURED else maker.matrices(key, entry)
        gates += [_with_options(key, gate, entry) for gate in made]
        if entry.uniform:
            _check_uniform(key, [gate for gate in gates if gate.tie == _tie(key, entry)])
    _check_once(gates)
    plan = GatePlan(gates)
    check_soft(plan, config)
    return plan


def _refuse_computed(model: nn.Module, config: LeapConfig) -> None:
    """Weight norm, spectral norm and torch's own pruning would otherwise leave their layers dense without a word."""
    computed = computed_weights(model)
    if computed and not config.include:
        listed = ", ".join(f"{name} ({maker})" for name, maker in list(computed.items())[:3])
        more = f" and {len(computed) - 3} more" if len(computed) > 3 else ""
        raise UserError(
            f"leap.gates: the weight of {listed}{more} is not a parameter, but computed from others, so it cannot "
            "be pruned; turn it into a parameter first (torch.nn.utils.prune.remove, remove_weight_norm, "
            "remove_spectral_norm, parametrize.remove_parametrizations), or name the tensors to prune in leap.include"
        )


class _Maker:
    """Makes the gates of one model, of the tensors that are trained and that leap.include and leap.exclude leave."""

    def __init__(self, model: nn.Module, config: LeapConfig, family: FamilyConfig | None) -> None:
        self.model, self.family = model, family
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        self.shapes = {name: shape for name, shape in tensor_shapes(model).items() if name in trained}
        self.owners = Owners(model)
        self.alone = len(config.gates) == 1  # whether no other gate takes notice of leap.include
        self.included = self._matched(config.include, "leap.include") if config.include else None
        self.dropped = set(self._matched(config.exclude, "leap.exclude")) if config.exclude else set()

    def _matched(self, patterns: Sequence[str], key: str) -> list[str]:
        """The trained tensors that patterns name, a shared one by any of its names; in the order of the model."""
        first = {name: first for name, first in self.owners.names().items() if first in self.shapes}
        found = {first[name] for name in match_names(first, patterns, key)}
        return [name for name in self.shapes if name in found]

    def matrices(self, key: str, entry: GateConfig) -> list[Gate]:
        """Gates of one granularity on single tensors."""
        chosen = prunable_matrices(self.model, self.family) if self.included is None else self.included
        chosen = [name for name in chosen if name in self.shapes and name not in self.dropped]  # frozen and tied ones
        chosen = _of_entry(key, entry, chosen, "tensor")
        if not chosen:
            raise UserError(
                f"{key}: {entry.granularity!r} matches no tensor of the model: it has no trainable linear weight "
                "that is not excluded; name tensors in leap.include"
            )
        gates, misfits = [], []
        for name in chosen:
            try:
                gates.append(self._matrix(name, entry.granularity))
            except UserError as error:
                misfits.append(str(error))
        if misfits:
            others = f"; so it is with {len(misfits) - 1} more of {len(chosen)} tensors" if len(misfits) > 1 else ""
            none = "; none fits: choose another granularity" if len(chosen) == len(misfits) > 1 else ""
            raise UserError(f"{misfits[0]}{none or others}")
        return gates

    def _matrix(self, name: str, granularity: str) -> Gate:
        view = self.owners.view(name, self.shapes[name], granularity)
        outputs = view.shape[-1 if view.transposed else -2] * (view.shape[0] if len(view.shape) == 3 else 1)
        biases = self.owners.biases(name, outputs, self.shapes) if granularity == "row" else ()
        return matrix_gate(name, view.shape, granularity, biases, view.transposed, view.kernel)

    def structured(self, key: str, entry: GateConfig) -> list[Gate]:
        """Gates whose units cover runs of several tensors."""
        kind = entry.granularity
        if kind == "depth":
            return self._depth(key, entry)
        if kind == "hidden":
            return [self._hidden(key, entry)]
        find = find_sublayers if kind == "layer" else find_structures
        found = [s for s in find(self.model, self.family) if s.kind == kind]
        if not found:
            raise UserError(_nothing_of(kind, key, self.model, self.family))
        found = [s for s in found if self._wanted(s)]
        names = _of_entry(key, entry, [s.name for s in found], f"block with a {kind}")
        found = [s for s in found if s.name in names]
        if not found:
            raise UserError(f"{key}: leap.include and leap.exclude leave no block with a {kind}; change them")
        if kind in ("layer", "expert"):
            self._check_whole(key, found)
        return self._layer_gates(found) if kind == "layer" else [self._gate(s) for s in found]

    def _depth(self, key: str, entry: GateConfig) -> list[Gate]:
        """One gate for every list of layers; a unit is a layer with all its tensors."""
        stacks = find_stacks(self.model, self.family)
        if not any(stack.units for stack in stacks):
            raise UserError(_nothing_of("depth", key, self.model, self.family))
        layers = {
            stack.layers[unit]: (stack, stack.tensors[unit])
            for stack in stacks
            for unit in stack.units
            if self._taken({tensor for tensor, counted in stack.tensors[unit].items() if counted})
            and stack.tensors[unit].keys() <= self.shapes.keys()
        }
        names = _of_entry(key, entry, list(layers), "layer")
        if not names:
            raise UserError(f"{key}: leap.include and leap.exclude leave no whole layer; change them")
        gates = []
        for stack in stacks:
            chosen = [tensors for name, (of, tensors) in layers.items() if of is stack and name in names]
            slices = [
                replace(part_slice(UnitRun(t, 0, 0, self.shapes[t][0], counted), self.shapes[t], 1), first_unit=unit)
                for unit, tensors in enumerate(chosen)
                for t, counted in tensors.items()
            ]
            if slices:
                gates.append(Gate(f"{stack.name}:depth", "depth", tuple(slices)))
        return gates

    def _hidden(self, key: str, entry: GateConfig) -> Gate:
        """One gate for the residual stream; a unit is a dimension in all tensors that read or write it."""
        try:
            stream = stream_of(self.model, self.family)
        except UserError as error:
            name = getattr(getattr(self.model, "config", None), "model_type", None) or type(self.model).__name__
            raise UserError(f"{key}: got 'hidden'; {name} has no stream that can be narrower: {error}") from error
        if self.included is not None and self.alone:
            raise UserError("leap.include: got names; 'hidden' takes dimensions out of all tensors at once: remove it")
        for option in ("include", "exclude"):
            if getattr(entry, option):
                raise UserError(f"{key}.{option}: got names; 'hidden' is one gate for the whole model: remove it")
        for part in stream.parts:
            if part.tensor not in self.shapes or part.tensor in self.dropped:
                raise UserError(
                    f"{key}: got 'hidden', which takes dimensions out of all tensors at once, but {part.tensor} "
                    f"{'is left out in leap.exclude' if part.tensor in self.dropped else 'is not trained'}; "
                    "change that, or remove 'hidden'"
                )
        experts = any(s.kind == "expert" for s in find_structures(self.model, self.family))
        if experts and entry.multiple_of % ALIGNED:
            raise UserError(
                f"{key}.multiple_of: got {entry.multiple_of}; allowed for 'hidden' where a model has experts: a "
                f"multiple of {ALIGNED}, which their product needs"
            )
        slices = (cut for part in stream.parts for cut in axis_slices(part, self.shapes[part.tensor], stream.width))
        return Gate("stream:hidden", "hidden", tuple(slices))

    def _wanted(self, structure: Structure) -> bool:
        """Whether the tensors of a block are trained, included and not excluded."""
        return self._taken({part.tensor for part in structure.parts if part.counted})

    def _check_whole(self, key: str, found: Sequence[Structure]) -> None:
        """Raises UserError where a part that works on without the others is not trained: no mask can set it to 0."""
        for structure in found:
            part = next((part.tensor for part in structure.parts if part.tensor not in self.shapes), None)
            if part is not None:
                effect = (
                    "tokens would go to removed ones" if structure.kind == "expert" else "would stay of removed ones"
                )
                raise UserError(
                    f"{key}: got {structure.kind!r}, but {part} is not trained, and {effect}; call "
                    f"requires_grad_(True) on it, or leave {structure.name} out in {key}.exclude"
                )

    def _taken(self, counted: set[str]) -> bool:
        included = counted if self.included is None else set(self.included)
        return counted <= self.shapes.keys() and bool(counted & included) and not counted & self.dropped

    def _gate(self, structure: Structure) -> Gate:
        slices = tuple(
            part_slice(part, self.shapes[part.tensor], structure.num_units)
            for part in structure.parts
            if part.tensor in self.shapes
        )
        return Gate(f"{structure.name}:{structure.kind}", structure.kind, slices)

    def _layer_gates(self, found: list[Structure]) -> list[Gate]:
        """One gate for every role: its units are the sublayers of that role."""
        gates = []
        for role in dict.fromkeys(s.role for s in found):
            blocks = [s for s in found if s.role == role]
            slices = tuple(
                replace(part_slice(part, self.shapes[part.tensor], 1), first_unit=unit)
                for unit, block in enumerate(blocks)
                for part in block.parts
                if part.tensor in self.shapes
            )
            gates.append(Gate(f"{role}:layer", "layer", slices))
        return gates


def part_slice(part: UnitRun, shape: Shape, num_units: int) -> Slice:
    """The slice that a part is: its tensor seen as a matrix whose rows (axis 0) or columns (axis 1) units run along."""
    rows, cols = shape[0], math.prod(shape[1:])
    length = part.size * num_units
    if part.axis == 0:
        region, block = (part.start, length, 0, cols), (part.size, cols)
    else:
        assert len(shape) == 2, f"{part.tensor}: units along axis {part.axis} of {shape}"
        region, block = (0, rows, part.start, length), (rows, part.size)
    return Slice(part.tensor, rows, cols, *block, counted=part.counted, region=region)


def axis_slices(part: UnitRun, shape: Shape, num_units: int) -> list[Slice]:
    """The slices that a part along any axis of a tensor is: one, or one for every index of the axes before it."""
    before, after = math.prod(shape[: part.axis]), math.prod(shape[part.axis + 1 :])
    if after == 1:
        return [Slice(part.tensor, before, num_units, before, 1, counted=part.counted)]
    return [
        Slice(
            part.tensor, before * num_units, after, 1, after, part.counted, region=(i * num_units, num_units, 0, after)
        )
        for i in range(before)
    ]


def _of_entry(key: str, entry: GateConfig, names: list[str], what: str) -> list[str]:
    """The names that an entry's own include and exclude leave."""
    kept = match_names(names, entry.include, f"{key}.include", what) if entry.include else names
    dropped = set(match_names(names, entry.exclude, f"{key}.exclude", what)) if entry.exclude else set()
    return [name for name in kept if name not in dropped]


def _nothing_of(kind: str, key: str, model: nn.Module, family: FamilyConfig | None) -> str:
    name = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
    table = family or family_of(model)
    shared = table is not None and table.shared and kind in ("layer", "depth")
    known = "can leave, as its layers share their weights" if shared else "is known here"
    kinds: list[str] = [s.kind for s in (*find_structures(model), *find_sublayers(model))]
    kinds += ["depth"] * any(stack.units for stack in find_stacks(model))
    kinds += ["hidden"] * (find_stream(model) is not None)
    allowed = ", ".join(("element", "row", "column", "block:RxC", "n:m", *dict.fromkeys(kinds)))
    return (
        f"{key}: got {kind!r}; {name} has none that {known}; allowed: {allowed}, "
        "or say where its blocks are in a family section"
    )


def _tie(key: str, entry: GateConfig) -> str:
    return f"{key}:{entry.granularity}"


def _with_options(key: str, gate: Gate, entry: GateConfig) -> Gate:
    """The gate with its entry's options, checked against its units."""
    for option in ("min_keep", "multiple_of"):
        value = getattr(entry, option)
        if value > gate.num_units:
            raise UserError(
                f"{key}.{option}: got {value}, more than the {gate.num_units} units of {gate.name}; allowed: at most "
                f"{gate.num_units}, or leave the block out with {key}.exclude"
            )
    tie = _tie(key, entry) if entry.uniform else None
    return replace(gate, min_keep=entry.min_keep, multiple_of=entry.multiple_of, tie=tie)


def _check_uniform(key: str, gates: list[Gate]) -> None:
    sizes = {gate.num_units for gate in gates}
    if len(sizes) > 1:
        listed = ", ".join(f"{gate.name} has {gate.num_units}" for gate in gates)
        raise UserError(
            f"{key}.uniform: got true, but the units differ in number: {listed[:200]}; "
            f"name blocks of one size in {key}.include, or set it to false"
        )


def _check_once(gates: list[Gate]) -> None:
    """A tensor has one gate of a granularity, and one that scores its single weights."""
    seen: set[tuple[str, str]] = set()
    for gate in gates:
        kind = "single weights" if gate.elementwise else gate.granularity
        for tensor in dict.fromkeys(part.tensor for part in gate.slices):
            if (tensor, kind) in seen:
                raise UserError(
                    f"leap.gates: two gates for {kind} on {tensor} (the second is {gate.granularity}); keep one, "
                    "or separate them with include and exclude"
                )
            seen.add((tensor, kind))
