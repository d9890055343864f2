"""Weights that others write into a hosted model: taken over before the first step, refused later.

LEAP keeps the latent weights, and the host fp32 masters of the copies that forward passes read; what is loaded into one
of them alone is overwritten at the next step, without a word.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from leap_dist.core.fragments import Fragment
from leap_dist.core.gating import LATENT, MASK, Gating
from leap_dist.errors import UserError

PROBES = 8  # elements of every fragment that are looked at before a step: whoever loads a tensor changes some of them


class Loaded:
    """Looks whether weights are what the last step left.

    fragments: all that this rank holds; copies: of some flat buffers, in their shape, what the host makes of them after
    a step for forward passes.
    """

    def __init__(self, gating: Gating, fragments: Sequence[Fragment], copies: Mapping[Tensor, Tensor]) -> None:
        self._gating, self._copies = gating, copies
        self._probes = {flat: _probes([f for f in fragments if f.flat is flat]) for flat in copies}
        self._masked = {part.flat: _probes([f for f in gating.weights if f.flat is part.flat]) for part in gating.parts}
        self._seen: dict[Tensor, Tensor] = {}  # what soft masks have left at the probes
        self._digests = {flat: _digest(flat) for flat in copies}

    def take_over(self) -> bool:
        """Put what was loaded since the start into the flat buffers and the latent weights; whether any rank had to.

        Where a flat buffer itself was written, it is right. Collective.
        """
        for flat, copy in self._copies.items():
            if _digest(flat) == self._digests[flat]:
                flat.data.copy_(copy)
            else:
                copy.data.copy_(flat)
        changed = torch.zeros((), device=self._gating.device)
        for part in self._gating.parts:
            (latent,) = self._gating.flat_states(part, LATENT)
            if not torch.equal(latent, part.hosted):
                latent.copy_(part.hosted)
                changed += 1
        return bool(self._gating.communicator.sum_(changed).item())

    def remember(self) -> None:
        """The hosted weights are as the last step left them: with soft masks W * M is not to be made again."""
        self._seen = {flat: flat.detach().view(-1)[places] for flat, places in self._masked.items()}

    def forget(self) -> None:
        """A checkpoint was loaded: what the last step left holds no longer."""
        self._seen = {}

    def check(self, flat: Tensor, soft: bool = False) -> None:
        """Raise UserError if the weights of a flat buffer are not those of the last step, as far as is looked at.

        soft: whether soft masks are in place; in the first step after a checkpoint was loaded they are not compared.
        """
        hosted = flat.detach().view(-1)
        alike = True
        if flat in self._masked:
            places, states = self._masked[flat], self._gating.states(flat)
            latent, mask = (states[key].view(-1)[places] for key in (LATENT, MASK))
            expected = self._seen.pop(flat, hosted[places]) if soft else latent * mask
            alike = _alike(hosted[places], expected)
        if alike and flat in self._copies:
            copy = self._copies[flat].detach().view(-1)
            places = self._probes[flat]
            found, made = copy[places.to(copy.device)], hosted[places].to(copy.device, copy.dtype)
            alike = _alike(found, made)
        if not alike:
            raise UserError(
                "weights: they were changed after the last step, and the next one would undo that silently; load "
                "weights before the first step, or a whole checkpoint by engine.load_checkpoint, and put weights that "
                "were exchanged for an evaluation back before the step"
            )


def _probes(fragments: Sequence[Fragment]) -> Tensor:
    """Places in a flat buffer: the first and the last element of every fragment, and some in between; int64."""
    places = [f.offset + k * (f.length - 1) // (PROBES - 1) for f in fragments if f.length for k in range(PROBES)]
    device = fragments[0].flat.device if fragments else None
    return torch.tensor(sorted(set(places)), dtype=torch.int64, device=device)


def _digest(flat: Tensor) -> int:
    """A sum over the bits of all elements."""
    return int(flat.detach().view(torch.int16).sum(dtype=torch.int64).item())


def _alike(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other) or torch.equal(one.nan_to_num(), other.nan_to_num())
