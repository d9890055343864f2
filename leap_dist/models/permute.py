"""The order of columns before an n:m mask: which columns are neighbours is free where their inputs can follow.

Of every m neighbours in a row n stay, so that columns which are strong in the same rows had better not be neighbours.
The inputs of attention's output projection are permuted with the rows of V, inside of each head and alike in all query
heads of a group; those of the FFN's down projection with the rows of up and gate. The model's function does not change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from leap_dist.config.family import FamilyConfig
from leap_dist.core.gates import GatePlan
from leap_dist.errors import UserError
from leap_dist.models.blocks import find_blocks
from leap_dist.models.structures import Block

MARK = "leap_permuted"  # in the config of a model whose columns are in another order, which it names; it goes along
ROUNDS = 300  # of swaps between pairs of groups
ROWS = 256  # of a matrix that the search looks at
Scores = Callable[[str], Tensor]  # a tensor's name -> what its weights are worth, of its shape


@torch.no_grad()
def find_orders(model: nn.Module, plan: GatePlan, scores: Scores, family: FamilyConfig | None) -> dict[str, Tensor]:
    """By block, the places that its columns come from: int64 of shape (units, columns of a head), or (1, neurons).

    Blocks whose output matrix has no n:m gate are left out. Raises UserError where no block can be reordered.
    """
    found, known = {}, list(_free(model, family))
    if not known:
        raise UserError(
            'leap.permute: got "greedy", but no attention or FFN block of this model is known; describe them in '
            "family, or remove it"
        )
    for block, tensor, columns in known:
        pattern = next((p for c in plan.covers.get(tensor, ()) if (p := plan.gates[c.gate].pattern)), None)
        if pattern is None or columns.shape[-1] % pattern[1]:
            continue
        worth = scores(tensor)
        orders = [greedy_order(torch.cat([worth[:, one] for one in unit]), *pattern) for unit in columns]
        found[block.structure.name] = torch.stack(orders)
    if not found:
        raise UserError(
            'leap.permute: got "greedy", but no n:m gate is on the output projection of an attention or FFN block; '
            "change leap.include, or remove it"
        )
    return found


def are_orders_of(model: nn.Module, orders: Mapping[str, Tensor], family: FamilyConfig | None) -> bool:
    """Whether each names a block of the model and puts all its columns into places of their own."""
    free = {block.structure.name: columns for block, _, columns in _free(model, family)}
    return bool(orders) and all(
        name in free
        and order.shape == (len(free[name]), free[name].shape[-1])
        and torch.equal(order.sort(1).values, torch.arange(order.shape[1]).expand_as(order))
        for name, order in orders.items()
    )


def order_of(model: nn.Module) -> str:
    """The name of the order that its columns were put in, here or in the model that it was made from; "": as it was."""
    return str(getattr(getattr(model, "config", None), MARK, ""))


@torch.no_grad()
def permute_(model: nn.Module, orders: Mapping[str, Tensor], family: FamilyConfig | None) -> None:
    """Put the columns of blocks in other orders, and what makes their inputs alike; marks the model's config."""
    parameters = dict(model.named_parameters())
    for block, tensor, columns in _free(model, family):
        order = orders.get(block.structure.name)
        if order is None:
            continue
        moved = torch.stack([unit[:, own] for unit, own in zip(columns, order, strict=True)])
        _move_(parameters[tensor], 1, columns, moved)
        for name, axis, places in _makers(block, len(columns), columns.shape[-1]):
            moved = torch.stack([unit[own] for unit, own in zip(places, order, strict=True)])
            _move_(parameters[name], axis, places, moved)
    if orders and hasattr(model, "config"):
        digest = hashlib.sha256(order_of(model).encode())
        for name in sorted(orders):
            digest.update(name.encode() + b"\0" + orders[name].cpu().numpy().tobytes())
        setattr(model.config, MARK, digest.hexdigest()[:16])


def _move_(parameter: Tensor, axis: int, places: Tensor, sources: Tensor) -> None:
    """What stood at `sources` along an axis stands at `places`."""
    index = torch.arange(parameter.shape[axis])
    index[places.flatten()] = sources.flatten()
    parameter.copy_(parameter.index_select(axis, index.to(parameter.device)))


def _free(model: nn.Module, family: FamilyConfig | None) -> Iterator[tuple[Block, str, Tensor]]:
    """(block, output matrix, its columns that can be reordered among themselves: (units, query heads, columns))."""
    for block in find_blocks(model, family):
        units = block.structure.num_units
        if block.structure.kind == "head" and units:
            value, out = block.silent[0][0], block.silent[1][0]
            columns = torch.arange(units)[:, None] * out.step + out.start + torch.arange(out.size)
            if out.axis == 1 and out.size % value.size == 0:
                yield block, out.tensor, columns.view(units, -1, value.size)
        elif block.structure.kind == "neuron":
            out = block.silent[0][0]
            if out.axis == 1:
                yield block, out.tensor, (out.start + torch.arange(units)).view(1, 1, -1)


def _makers(block: Block, num: int, size: int) -> Iterator[tuple[str, int, Tensor]]:
    """(tensor, axis, places of shape (num, size)) of what makes the inputs: V's rows, or those of up and gate."""
    if block.structure.kind == "head":
        for span in block.silent[0]:
            yield span.tensor, span.axis, torch.arange(num)[:, None] * span.step + span.start + torch.arange(size)
        return
    out = block.silent[0][0]
    for part in block.structure.parts:
        if part.tensor != out.tensor:
            yield part.tensor, part.axis, (part.start + torch.arange(size)).view(1, -1)


def greedy_order(scores: Tensor, n: int, m: int) -> Tensor:
    """An order of columns in which an n:m mask keeps more of the scores (rows, columns); never less. int64.

    It starts with the strongest columns dealt to different groups, or with the order that is there, and swaps columns
    of two groups wherever that keeps more. The same for the same scores.
    """
    by_column = scores[:: -(-len(scores) // ROWS)].T.contiguous()
    generator = torch.Generator().manual_seed(0)
    num = len(by_column) // m
    dealt = by_column.sum(1).argsort(descending=True, stable=True).view(m, num)
    dealt = torch.stack([row.flip(0) if turn % 2 else row for turn, row in enumerate(dealt)])
    starts = [torch.arange(len(by_column)).view(num, m), dealt.T.contiguous()]
    groups = max(starts, key=lambda start: _kept(by_column, start, n).sum().item())
    kept = _kept(by_column, groups, n)
    for _ in range(ROUNDS if num > 1 else 0):
        one, other = torch.randperm(num, generator=generator)[: num // 2 * 2].view(2, -1)
        places = torch.randint(m, (2, len(one)), generator=generator)
        pair, row = groups[torch.stack([one, other])], torch.arange(len(one))
        pair[0, row, places[0]], pair[1, row, places[1]] = pair[1, row, places[1]], pair[0, row, places[0]]
        after = _kept(by_column, pair, n)
        better = after.sum(0) > kept[one] + kept[other]
        for side, index in enumerate((one, other)):
            groups[index[better]], kept[index[better]] = pair[side][better], after[side][better]
    return groups.flatten()


def _kept(by_column: Tensor, groups: Tensor, n: int) -> Tensor:
    """What stays of groups of columns (groups, m) or (2, groups, m): fp64, without the last axis."""
    values = by_column[groups]
    rank = torch.zeros_like(values, dtype=torch.int8)  # by comparisons: a sort of so few takes six times as long
    for i in range(groups.shape[-1]):
        one = values[..., i : i + 1, :]
        rank[..., :i, :] += one > values[..., :i, :]
        rank[..., i + 1 :, :] += one >= values[..., i + 1 :, :]
    return (values * (rank < n)).sum((-2, -1), dtype=torch.float64)
