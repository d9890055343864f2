"""Binding: where a DeepSpeed engine keeps each parameter's fp32 master, under ZeRO 0 to 3.

Checked against DeepSpeed 0.19.8. Stages 1 and 2 keep one flat partition a parameter group, stage 3 one a sub-group;
a fragment is tied to its flat partition through the addresses of public views.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from leap_dist.core.communicator import Communicator
from leap_dist.core.fragments import Fragment
from leap_dist.core.gate_values import gate_sizes
from leap_dist.core.gating import ELEMENT_MASK, MASK
from leap_dist.core.inputs import INPUTS, num_features


def hosted_parameters(engine: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of everything that the engine trains: what its optimizer was given, as it was named then.

    What was left out of the optimizer, or came into the model later, is not trained, whatever it requires; what is
    frozen later is.
    """
    return list(engine.leap.hosted.items())


def flat_partitions(engine: Any) -> list[Tensor]:
    """The flat fp32 partitions that this rank's base optimizer steps, in the order of their groups."""
    optimizer = engine.optimizer
    for attribute in (
        "single_partition_of_fp32_groups",
        "fp32_partitioned_groups_flat",
        "fp32_groups_flat_partition",
    ):
        if hasattr(optimizer, attribute):
            return list(getattr(optimizer, attribute))
    return []


def forward_copies(engine: Any) -> dict[Tensor, Tensor]:
    """Of every flat partition, what this rank's part of the parameters that forward passes read is kept in."""
    optimizer, flats = engine.optimizer, flat_partitions(engine)
    if engine.zero_optimization_stage() == 3:
        return dict(zip(flats, optimizer.fp16_partitioned_groups_flat, strict=True))
    if not flats:
        return {}
    by_rank = (
        "parallel_partitioned_bit16_groups",
        "bf16_partitioned_groups",
    )  # the second of stage 1 with fp32 gradients
    parts = next(getattr(optimizer, name) for name in by_rank if hasattr(optimizer, name))
    found = zip(flats, parts, optimizer.real_dp_process_group, strict=True)
    return {flat: whole[torch.distributed.get_rank(group)] for flat, whole, group in found}


def find_fragments(engine: Any) -> list[Fragment]:
    """The fragment of every parameter that this rank holds."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [Fragment(name, 0, p.numel(), p, 0) for name, p in hosted_parameters(engine)]
    flats = flat_partitions(engine)
    found = []
    for name, parameter in hosted_parameters(engine):
        view, start, length = _zero3_view(parameter) if stage == 3 else _zero12_view(parameter)
        if view is not None and length > 0:
            flat = _flat_of(view, flats)
            offset = int(view.storage_offset() - flat.storage_offset())
            found.append(Fragment(name, start, length, flat, offset))
    return found


def all_fragments(engine: Any) -> list[Fragment]:
    """The fragments of every parameter, of the gates' own values and of sums of inputs that this rank holds."""
    inputs = engine.leap.inputs.fragments if engine.leap.inputs else ()
    return [*engine.leap.fragments, *engine.leap.gating.values.fragments, *inputs]


def trained_shapes(engine: Any) -> dict[str, tuple[int, ...]]:
    """The whole shape of everything that checkpoints hold, by name: parameters, gates' own values, sums of inputs."""
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in hosted_parameters(engine)}
    shapes |= {name: (size,) for name, size in gate_sizes(engine.leap.plan).items()}
    return shapes | ({INPUTS: (num_features(engine.leap.axes),)} if engine.leap.axes else {})


def _zero12_view(parameter: Any) -> tuple[Tensor | None, int, int]:
    """(view into the flat partition, first element, length) under stages 1 and 2."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None, 0, 0
    view = mapping.get_hp_fragment()
    return view, mapping.lp_fragment_address.start, view.numel()


def _zero3_view(parameter: Any) -> tuple[Tensor, int, int]:
    """The same under stage 3, where every rank holds an equal part and the last parts are padded."""
    from deepspeed.utils import safe_get_local_fp32_param

    view = safe_get_local_fp32_param(parameter)
    start = torch.distributed.get_rank(parameter.ds_process_group) * view.numel()
    return view, start, max(0, min(view.numel(), parameter.ds_numel - start))


def _flat_of(view: Tensor, flats: list[Tensor]) -> Tensor:
    """The flat partition that a view lies in."""
    for flat in flats:
        same = flat.untyped_storage().data_ptr() == view.untyped_storage().data_ptr()
        first = view.storage_offset() - flat.storage_offset()
        if same and first >= 0 and first + view.numel() <= flat.numel():
            return flat
    raise RuntimeError("a parameter's fp32 fragment lies in none of the engine's flat partitions")


def everyone(engine: Any) -> Communicator:
    """Sums over all ranks, which see data of their own under every stage."""
    if engine.dp_world_size == 1:
        return Communicator()
    return Communicator(torch.distributed.group.WORLD, torch.device(engine.device))


def make_communicator(engine: Any) -> Communicator:
    """Sums over the ranks that share the model; stage 0 keeps everything on every rank and needs none."""
    if engine.zero_optimization_stage() == 0 or engine.dp_world_size == 1:
        return Communicator()
    return Communicator(engine.optimizer.dp_process_group, torch.device(engine.device))


def refresh_hosted(engine: Any) -> None:
    """Carry changed fp32 partitions into the parameters that forward passes read, as a step would."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    elif engine.zero_optimization_stage() == 3:
        for sub_group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        optimizer._partition_all_parameters()


def gather(engine: Any, names: Iterable[str], key: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """(name, full tensor on the CPU, in the parameter's shape) for every name, one at a time, on every rank.

    `key` names an optimizer state; None gives the fp32 masters. Collective: every rank takes every item.
    """
    fragments: dict[str, list[Fragment]] = {}
    for fragment in all_fragments(engine):
        fragments.setdefault(fragment.tensor, []).append(fragment)
    communicator = make_communicator(engine)
    shapes = trained_shapes(engine)
    for name in names:
        dtype = torch.float64 if name == INPUTS else torch.float32
        dtype = torch.uint8 if key in (MASK, ELEMENT_MASK) else dtype
        full = torch.zeros(torch.Size(shapes[name]).numel(), dtype=dtype)
        for f in fragments.get(name, ()):
            source = f.flat if key is None else engine.leap.states_of(f.flat)[key]
            full[f.start : f.start + f.length] = f.view(source).cpu()
        full = communicator.sum_(full).view(shapes[name])
        yield name, full.bool() if dtype == torch.uint8 else full.add_(0.0)  # +0.0 turns -0.0 into 0.0
