"""Fixed masks: those that a model has at the start, or that a file gives, in place of masks made from scores."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from leap_dist.core.gates import Gate
from leap_dist.core.gating import LATENT, MASK, Gating
from leap_dist.errors import UserError
from leap_dist.ops.slices import Slice

Shape = tuple[int, ...]
START = "leap.start"
ALLOWED = "allowed: as model.name the model/ of the run that they are of, or an export of it"


class Fixed(NamedTuple):
    """masks: by tensor name, packed (np.packbits, 1 = kept); empty: where the weights are not zero.

    order: the name of the order that leap.permute put the columns in that they are for; "": as they were; None: in one
    that has no name, of an older version. key: the setting that named them.
    """

    masks: Mapping[str, Tensor]
    order: str | None = ""
    key: str = START


def mask_gates(masks: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> list[Gate]:
    """A gate of single weights for every masked tensor; what is no matrix (a bias) is not counted."""
    return [Gate(f"{name}:element", "element", (_whole(name, shapes[name]),)) for name in shapes if name in masks]


def _whole(name: str, shape: Shape) -> Slice:
    return Slice(name, shape[0], torch.Size(shape[1:]).numel(), 1, 1, counted=len(shape) > 1)


def check_order(gating: Gating, fixed: Fixed) -> None:
    """Raise UserError for masks of an order without a name on a model that has weights where they prune. Collective.

    For a model as it was loaded: weights that were trained are not zero any more.
    """
    if fixed.order is not None:
        return
    others = torch.zeros(1, dtype=torch.int64, device=gating.device)
    for fragment in gating.weights:
        mask = unpack(fixed.masks[fragment.tensor], fragment.start, fragment.length)
        others += torch.count_nonzero(gating.state(fragment, LATENT) * ~mask.to(gating.device))
    if number := int(gating.communicator.sum_(others)):
        raise UserError(
            f"{fixed.key}: leap.permute put the columns of the model that the masks are of in another order, and "
            f"{number} of the weights that they prune are not zero in this one; {ALLOWED}"
        )


def put_masks_(gating: Gating, fixed: Fixed) -> list[int]:
    """Make MASK what is fixed; returns the kept units of every gate. Collective."""
    kept = torch.zeros(len(gating.plan.gates), dtype=torch.int64, device=gating.device)
    for fragment in gating.weights:
        mask = gating.state(fragment, MASK)
        if fixed.masks:
            mask.copy_(unpack(fixed.masks[fragment.tensor], fragment.start, fragment.length))
        else:
            torch.ne(gating.state(fragment, LATENT), 0, out=mask)
        for cover in gating.plan.covers[fragment.tensor]:
            kept[cover.gate] += torch.count_nonzero(mask)
    found: list[int] = gating.communicator.sum_(kept).tolist()
    return found


def unpack(packed: Tensor, start: int, length: int) -> Tensor:
    """The bits [start, start + length) of a packed mask, bool of shape (length,)."""
    first = start // 8
    places = torch.arange(7, -1, -1, dtype=torch.uint8)
    bits = packed[first : -(-(start + length) // 8), None] >> places & 1
    return bits.flatten()[start - 8 * first :][:length].bool()
