"""Gating: the gates of a model over the fragments that one rank holds, and the state that belongs to them.

update.py moves it by a gradient, masks.py makes masks from kept counts, magnitude.py scores from weights.
"""

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from leap_dist.config.leap import LeapConfig
from leap_dist.core.communicator import Communicator
from leap_dist.core.fragments import Fragment
from leap_dist.core.gate_values import SCORES, THRESHOLDS, GateValues
from leap_dist.core.gates import GatePlan
from leap_dist.core.parts import Part
from leap_dist.ops import dispatch as ops

# Keys of the optimizer state; every tensor has the shape of its flat partition.
EXP_AVG, EXP_AVG_SQ, LATENT, MASK = "exp_avg", "exp_avg_sq", "latent", "mask"
SCORE, SCORE_EXP_AVG, SCORE_EXP_AVG_SQ = "score", "score_exp_avg", "score_exp_avg_sq"
ELEMENT_MASK = "element_mask"  # the element gates' own masks, in a plan where some tensor has several gates

State = dict[Tensor, dict[str, Tensor]]


MOMENTS = EXP_AVG, EXP_AVG_SQ, SCORE_EXP_AVG, SCORE_EXP_AVG_SQ


def state_keys(plan: GatePlan, config: LeapConfig) -> tuple[str, ...]:
    """The state of the gated partition, the same on every rank, also on one that holds nothing; that of a run that
    takes no step has no moments, of one whose masks are fixed no scores; frozen weights have no moments, scores that
    share those of the weights, or are the weights' size, none of their own."""
    keys = [LATENT, MASK] if config.frozen else [EXP_AVG, EXP_AVG_SQ, LATENT, MASK]
    if config.start is None and any(gate.elementwise for gate in plan.gates):
        moments = not config.shares_moments and config.rule != "magnitude"
        keys += [SCORE, SCORE_EXP_AVG, SCORE_EXP_AVG_SQ] if moments else [SCORE]
        if any(map(plan.hybrid, plan.covers)):
            keys.append(ELEMENT_MASK)
    return tuple(key for key in keys if config.mode == "train" or key not in MOMENTS)


def make_states(
    plan: GatePlan,
    fragments: Sequence[Fragment],
    flats: Iterable[Tensor],
    states: State,
    keys: Sequence[str],
    in_place: bool = False,
) -> None:
    """Make what is missing of the state of flat buffers, each tensor of the buffer's shape; `keys` are those of gated
    ones. flats: those that the fragments lie in, and others, which hold nothing but padding here and are stepped too.
    in_place: W has no place beside W * M, as no step is taken and no weight can come back."""
    plain = [key for key in (EXP_AVG, EXP_AVG_SQ) if key in keys]
    gated = {f.flat for f in fragments if f.tensor in plan.covers}
    for flat in dict.fromkeys([*(fragment.flat for fragment in fragments), *flats]):
        for key in keys if flat in gated else plain:
            if key not in states[flat]:
                states[flat][key] = flat.detach() if in_place and key == LATENT else _initial(key, flat)


def _initial(key: str, flat: Tensor) -> Tensor:
    """A fresh state tensor of the flat buffer's shape."""
    if key == LATENT:
        return flat.detach().clone()
    if key in (MASK, ELEMENT_MASK):
        return torch.ones_like(flat, dtype=torch.bool, requires_grad=False)
    return torch.zeros_like(flat, requires_grad=False)


class Gating:
    """Local fragments of gated tensors and of the gates' own values.

    keys: of the state; fragments: this rank's of the gated group; values: its share of thresholds and structured
    scores; state: the optimizer's, made before; no_decay: tensors without weight decay. `unit_mask` is the mask of all
    structured units, shape (num_structured_units,), on this rank's device, the same on every rank; `own_units` has this
    rank's share of it.
    """

    def __init__(
        self,
        plan: GatePlan,
        keys: Sequence[str],
        fragments: Sequence[Fragment],
        values: GateValues,
        state: State,
        communicator: Communicator,
        no_decay: Collection[str],
    ) -> None:
        self.plan = plan
        self.weights = [f for f in fragments if f.tensor in plan.covers and f.length]
        self.values = values
        self.own_thresholds = [f for f in values.fragments if f.tensor == THRESHOLDS and f.length]
        self.own_scores = [f for f in values.fragments if f.tensor == SCORES and f.length]
        self._state = state
        self.communicator = communicator
        flats = {id(f.flat): f.flat for f in self.weights}
        owned = {key: [f for f in self.weights if id(f.flat) == key] for key in flats}
        self.parts = [Part(plan, flat, owned[key], no_decay) for key, flat in flats.items()]
        self.device = values.flat.device
        self.keys = keys
        self.element_key = ELEMENT_MASK if ELEMENT_MASK in self.keys else MASK
        self.unit_mask = torch.ones(plan.num_structured_units, dtype=torch.bool, device=self.device)
        self.own_units = torch.zeros_like(self.unit_mask)
        structured = [0 if gate.elementwise else gate.num_units for gate in plan.gates]
        self.structured_units = torch.tensor(structured, dtype=torch.int64, device=self.device)  # of every gate

    # The state

    @property
    def extra_bytes(self) -> int:
        """Bytes of LEAP's own state on this rank: latent weights, masks, scores and their moments."""
        flats = {id(f.flat): f.flat for f in self.weights}
        own = [key for key in self.keys if key not in (EXP_AVG, EXP_AVG_SQ)]
        kept = [(flat, self._state[flat][key]) for flat in flats.values() for key in own]
        return sum(v.numel() * v.element_size() for flat, v in kept if v.data_ptr() != flat.data_ptr())

    def state(self, fragment: Fragment, key: str) -> Tensor:
        """This fragment's part of a state tensor, shape (length,)."""
        return fragment.view(self._state[fragment.flat][key])

    def states(self, flat: Tensor) -> dict[str, Tensor]:
        """All state tensors of a flat buffer."""
        return self._state[flat]

    def buffer(self, fragment: Fragment, key: str) -> Tensor:
        """The state tensor that this fragment's part lies in, the same object at every call."""
        return self._state[fragment.flat][key]

    def flat_states(self, part: Part, *keys: str) -> list[Tensor]:
        """The state tensors of a part, flat."""
        return [self._state[part.flat][key].view(-1) for key in keys]

    # Masks

    def element_masks(self, part: Part) -> Tensor:
        """A copy of the element gates' own masks in a plan with hybrids, ones where there are none; bool, flat."""
        state = self._state[part.flat]
        if ELEMENT_MASK in state:
            return state[ELEMENT_MASK].view(-1).clone()
        return torch.ones(part.hosted.shape, dtype=torch.bool, device=part.device)

    def times_units(self, mask: Tensor, patches: Tensor) -> Tensor:
        """The mask, flat, times those of the structured units on patches; in place."""
        ops.expand_units_(patches, self.unit_mask, None, mask)
        return mask

    # Thresholds

    def gather_thresholds(self) -> Tensor:
        """All thresholds, fp32 of shape (G,), from the fragments on all ranks."""
        sigma = torch.zeros(len(self.plan.gates), device=self.device)
        for fragment in self.own_thresholds:
            sigma[fragment.start : fragment.start + fragment.length] = fragment.view(fragment.flat)
        return self.communicator.sum_(sigma).cpu()

    def write_thresholds(self, sigma: Tensor) -> None:
        """Put new thresholds (G,) into the fragments that this rank holds."""
        for fragment in self.own_thresholds:
            own = sigma[fragment.start : fragment.start + fragment.length]
            fragment.view(fragment.flat).copy_(own, non_blocking=True)
