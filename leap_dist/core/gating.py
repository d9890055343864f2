"""Gating: the gates of a model over the fragments that one rank holds.

It turns the gradient of the masked weights into gradients of scores and thresholds, and kept counts into masks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from leap_dist.core.communicator import Communicator
from leap_dist.core.fragments import Fragment, add_unit_sums_, expand_units
from leap_dist.core.gates import Cover, GatePlan
from leap_dist.ops import reference as ops
from leap_dist.ops.pattern import PatternRun, PatternSelector
from leap_dist.ops.select import Run, Selector

# Keys of the optimizer state; every tensor has the shape of its flat partition.
EXP_AVG, EXP_AVG_SQ, LATENT, MASK = "exp_avg", "exp_avg_sq", "latent", "mask"
SCORE, SCORE_EXP_AVG, SCORE_EXP_AVG_SQ = "score", "score_exp_avg", "score_exp_avg_sq"
ELEMENT_MASK = "element_mask"  # an element gate's own mask, where other gates cover the same tensor
# Names under which a model hosts the gates' own parameters.
THRESHOLDS, SCORES = "leap.thresholds", "leap.scores"

State = dict[Tensor, dict[str, Tensor]]


def state_keys(plan: GatePlan) -> tuple[str, ...]:
    """The state of the gated partition, the same on every rank, also on one that holds nothing."""
    keys = [EXP_AVG, EXP_AVG_SQ, LATENT, MASK]
    if any(gate.elementwise for gate in plan.gates):
        keys += [SCORE, SCORE_EXP_AVG, SCORE_EXP_AVG_SQ]
    if any(plan.hybrid(gate.slices[0].tensor) for gate in plan.gates if gate.elementwise):
        keys.append(ELEMENT_MASK)
    return tuple(keys)


class Gating:
    """Masks and gate gradients over local fragments.

    fragments: this rank's fragments of the gated group, gate parameters included; state: the optimizer's, made
    before. `unit_mask` is the mask of all structured units, shape (num_structured_units,), the same on every rank.
    """

    def __init__(self, plan: GatePlan, fragments: Sequence[Fragment], state: State, communicator: Communicator) -> None:
        self.plan = plan
        self.weights = [f for f in fragments if f.tensor in plan.covers and f.length]
        self.hosted_thresholds = [f for f in fragments if f.tensor == THRESHOLDS and f.length]
        self.hosted_scores = [f for f in fragments if f.tensor == SCORES and f.length]
        self._state = state
        self._communicator = communicator
        self.unit_mask = torch.ones(plan.num_structured_units, dtype=torch.bool)
        self._ranked = [index for index, gate in enumerate(plan.gates) if gate.pattern is None]
        self._runs, fragment_gates = self._number_runs(self._local_runs())
        self._selector = Selector([plan.gates[i].num_units for i in self._ranked], fragment_gates, communicator)
        self._patterned = self._pattern_fragments()
        widest = max((gate.pattern[1] for gate in plan.gates if gate.pattern), default=1)
        self._pattern_selector = PatternSelector([run for run, _ in self._patterned], widest, communicator)

    def state(self, fragment: Fragment, key: str) -> Tensor:
        """This fragment's part of a state tensor, shape (length,)."""
        return fragment.view(self._state[fragment.flat][key])

    # Gradients

    def score_gradients(self, adam: ops.Adam | None) -> tuple[Tensor, Tensor]:
        """(dL/dsigma, dL/dS of structured units), float64, summed over ranks; element scores are updated on the way.

        With G = dL/d(W * M): dL/dS_u = sum_{i in u} G_i W_i prod_{g' != g} M_g',i and dL/dsigma = sum_u M_u dL/dS_u
        (algorithm.md, section 2). `adam` updates the element scores; None leaves them.
        """
        num_gates = len(self.plan.gates)
        sums = torch.zeros(num_gates + self.plan.num_structured_units, dtype=torch.float64)
        for fragment in self.weights:
            if fragment.flat.grad is not None:
                self._add_gradients_(sums, fragment, adam)
        self._communicator.sum_(sums)
        sigma, units = sums[:num_gates], sums[num_gates:]
        for index in self.plan.structured:
            where = self.plan.units(index)
            sigma[index] = units[where][self.unit_mask[where]].sum()
        return sigma, units

    def _add_gradients_(self, sums: Tensor, fragment: Fragment, adam: ops.Adam | None) -> None:
        """Add one fragment's part of all gate gradients to `sums`, laid out (thresholds, structured units)."""
        grad, latent = fragment.gradient(), self.state(fragment, LATENT)
        num_gates, product = len(self.plan.gates), None
        for cover in self.plan.covers[fragment.tensor]:
            others = self._others_mask(fragment, cover)
            if self.plan.gates[cover.gate].elementwise:
                if adam is not None:
                    moments = self.state(fragment, SCORE_EXP_AVG), self.state(fragment, SCORE_EXP_AVG_SQ)
                    score, own = self.state(fragment, SCORE), self._own_mask(fragment, cover)
                    sums[cover.gate] += ops.element_scores_(score, grad, latent, own, others, *moments, adam).cpu()
                continue
            product = grad * latent if product is None else product
            values = product if others is None else product * others
            units = sums[num_gates:][self.plan.units(cover.gate)]
            self._add_unit_sums_(units, values, fragment, cover)

    def _add_unit_sums_(self, units: Tensor, values: Tensor, fragment: Fragment, cover: Cover) -> None:
        local = torch.zeros(units.shape, dtype=torch.float64, device=values.device)
        for part in cover.slices:
            add_unit_sums_(local, values, fragment.start, part)
        units += local.to(units.device)

    # Scores from magnitude

    def magnitude_scores_(self, scaled: bool) -> None:
        """S_u = mean |W| over the unit's prunable weights; `scaled` divides by the mean over the gate.

        Biases follow their unit without a say. Used to start learned scores, and by the magnitude rule.
        """
        num_gates = len(self.plan.gates)
        sums = torch.zeros(num_gates + self.plan.num_structured_units, dtype=torch.float64)
        for fragment in self.weights:
            if not self.plan.counted(fragment.tensor):
                continue
            size = self.state(fragment, LATENT).abs()
            for cover in self.plan.covers[fragment.tensor]:
                if self.plan.gates[cover.gate].elementwise:
                    self.state(fragment, SCORE).copy_(size)
                else:
                    units = sums[num_gates:][self.plan.units(cover.gate)]
                    self._add_unit_sums_(units, size, fragment, cover)
                sums[cover.gate] += size.sum(dtype=torch.float64).cpu() if scaled else 0.0
        self._communicator.sum_(sums)
        self._write_magnitudes(sums[:num_gates], sums[num_gates:], scaled)

    def _write_magnitudes(self, totals: Tensor, units: Tensor, scaled: bool) -> None:
        """Turn sums of |W| over gates and units into scores."""
        gates = self.plan.gates
        means = [(t / g.num_weights).clamp(min=1e-30) for t, g in zip(totals, gates, strict=True)] if scaled else []
        for index in self.plan.structured:
            units[self.plan.units(index)] /= gates[index].unit_sizes * (means[index] if scaled else 1.0)
        for fragment in self.hosted_scores:
            run = units[fragment.start : fragment.start + fragment.length]
            fragment.view(fragment.flat).copy_(run)
        for fragment in self.weights if scaled else ():
            for cover in self.plan.covers[fragment.tensor]:
                if self.plan.gates[cover.gate].elementwise:
                    self.state(fragment, SCORE).div_(means[cover.gate].item())

    # Thresholds

    def gather_thresholds(self) -> Tensor:
        """All thresholds, fp32 of shape (G,), from the fragments on all ranks."""
        sigma = torch.zeros(len(self.plan.gates))
        for fragment in self.hosted_thresholds:
            sigma[fragment.start : fragment.start + fragment.length] = fragment.view(fragment.flat).cpu()
        return self._communicator.sum_(sigma)

    def write_thresholds(self, sigma: Tensor) -> None:
        """Put new thresholds (G,) into the fragments that this rank holds."""
        for fragment in self.hosted_thresholds:
            fragment.view(fragment.flat).copy_(sigma[fragment.start : fragment.start + fragment.length])

    # Masks

    def make_masks(self, keep: Sequence[int]) -> None:
        """Set every mask to the top `keep` units of its gate by score, and MASK to their product."""
        masks = self._selector.masks(self._runs, [keep[index] for index in self._ranked])
        units = torch.zeros(self.plan.num_structured_units, dtype=torch.uint8)
        for where, mask in zip(self._targets, masks, strict=True):
            if isinstance(where, Fragment):
                self._element_mask(where).copy_(mask)
            else:
                units[where] = mask.to(units)
        self._make_patterns(keep)
        self.unit_mask = self._communicator.sum_(units).bool()
        self.spread_masks()

    def _make_patterns(self, keep: Sequence[int]) -> None:
        """The masks of n:m gates, of whose every m neighbours the same number is kept."""
        if len(self._ranked) < len(keep):
            kept = [
                num * gate.pattern[1] // gate.num_units if gate.pattern else 0
                for num, gate in zip(keep, self.plan.gates, strict=True)
            ]
            masks = self._pattern_selector.masks(kept)
            for (_, fragment), mask in zip(self._patterned, masks, strict=True):
                self._element_mask(fragment).copy_(mask)

    def spread_masks(self) -> None:
        """MASK = product of the masks of all gates that cover an element, from unit_mask and ELEMENT_MASK."""
        for fragment in self.weights:
            covers = self.plan.covers[fragment.tensor]
            if len(covers) == 1 and self.plan.gates[covers[0].gate].elementwise:
                continue  # made in place
            mask = self.state(fragment, MASK).fill_(True)
            for cover in covers:
                mask &= self._own_mask(fragment, cover)

    def count_kept(self) -> int:
        """Prunable weights that MASK keeps, on all ranks."""
        counted = [f for f in self.weights if self.plan.counted(f.tensor)]
        kept = sum(int(torch.count_nonzero(self.state(f, MASK))) for f in counted)
        return int(self._communicator.sum_(torch.tensor([kept])).item())

    def _element_mask(self, fragment: Fragment) -> Tensor:
        """Where the mask of the element gate on a fragment lies."""
        return self.state(fragment, ELEMENT_MASK if self.plan.hybrid(fragment.tensor) else MASK)

    def _own_mask(self, fragment: Fragment, cover: Cover) -> Tensor:
        """One gate's mask on a fragment, bool of shape (length,)."""
        if self.plan.gates[cover.gate].elementwise:
            return self._element_mask(fragment)
        out = torch.empty(fragment.length, dtype=torch.bool, device=fragment.flat.device)
        units = self.unit_mask[self.plan.units(cover.gate)].to(out.device)
        for part in cover.slices:
            expand_units(units, out, fragment.start, part)
        return out

    def _others_mask(self, fragment: Fragment, cover: Cover) -> Tensor | None:
        """The product of the masks of the other gates on a fragment; None where there are no others."""
        product: Tensor | None = None
        for other in self.plan.covers[fragment.tensor]:
            if other.gate != cover.gate:
                own = self._own_mask(fragment, other)
                product = own if product is None else product & own
        return product

    # Runs of scores, for the selection

    def _local_runs(self) -> list[tuple[int, int, Tensor, Fragment | slice]]:
        """(gate, first unit, scores, where the mask goes) for every run of scores on this rank."""
        runs: list[tuple[int, int, Tensor, Fragment | slice]] = []
        for fragment in self.weights:
            for cover in self.plan.covers[fragment.tensor]:
                gate = self.plan.gates[cover.gate]
                if gate.elementwise and gate.pattern is None:
                    runs.append((cover.gate, fragment.start, self.state(fragment, SCORE), fragment))
        for fragment in self.hosted_scores:
            for index in self.plan.structured:
                units = self.plan.units(index)
                first, last = (
                    max(units.start, fragment.start),
                    min(units.stop, fragment.start + fragment.length),
                )
                if first < last:
                    scores = fragment.view(fragment.flat)[first - fragment.start : last - fragment.start]
                    runs.append((index, first - units.start, scores, slice(first, last)))
        return runs

    def _number_runs(self, local: list[tuple[int, int, Tensor, Fragment | slice]]) -> tuple[list[Run], list[int]]:
        """The local runs with their places among those of all ranks, and the gate at every place."""
        everywhere = self._communicator.gather([(gate, start) for gate, start, _, _ in local])
        places = sorted(place for rank in everywhere for place in rank)
        order = {place: number for number, place in enumerate(places)}
        self._targets = [where for _, _, _, where in local]
        number = {gate: position for position, gate in enumerate(self._ranked)}
        runs = [Run(number[gate], scores, order[gate, start]) for gate, start, scores, _ in local]
        return runs, [number[gate] for gate, _ in places]

    def _pattern_fragments(self) -> list[tuple[PatternRun, Fragment]]:
        """The runs of scores under n:m gates on this rank, and whose they are."""
        found = []
        for fragment in self.weights:
            for cover in self.plan.covers[fragment.tensor]:
                if pattern := self.plan.gates[cover.gate].pattern:
                    scores = self.state(fragment, SCORE)
                    found.append((PatternRun(cover.gate, fragment.start, scores, pattern[1]), fragment))
        return found
