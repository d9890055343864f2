"""Gating: the gates of a model over the fragments that one rank holds.

It turns the gradient of the masked weights into gradients of scores and thresholds, and kept counts into masks.
"""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from leap_dist.core.communicator import Communicator
from leap_dist.core.flips import Flips
from leap_dist.core.fragments import Fragment
from leap_dist.core.gates import Cover, GatePlan
from leap_dist.core.parts import Part
from leap_dist.core.pattern import PatternRun, PatternSelector
from leap_dist.core.select import Runs, Selector
from leap_dist.ops import dispatch as ops
from leap_dist.ops.reference import Adam, run_table
from leap_dist.ops.slices import add_unit_sums_

# Keys of the optimizer state; every tensor has the shape of its flat partition.
EXP_AVG, EXP_AVG_SQ, LATENT, MASK = "exp_avg", "exp_avg_sq", "latent", "mask"
SCORE, SCORE_EXP_AVG, SCORE_EXP_AVG_SQ = "score", "score_exp_avg", "score_exp_avg_sq"
ELEMENT_MASK = "element_mask"  # the element gates' own masks, in a plan where some tensor has several gates
# Names under which a model hosts the gates' own parameters.
THRESHOLDS, SCORES = "leap.thresholds", "leap.scores"

State = dict[Tensor, dict[str, Tensor]]


def state_keys(plan: GatePlan) -> tuple[str, ...]:
    """The state of the gated partition, the same on every rank, also on one that holds nothing."""
    keys = [EXP_AVG, EXP_AVG_SQ, LATENT, MASK]
    if any(gate.elementwise for gate in plan.gates):
        keys += [SCORE, SCORE_EXP_AVG, SCORE_EXP_AVG_SQ]
        if any(map(plan.hybrid, plan.covers)):
            keys.append(ELEMENT_MASK)
    return tuple(keys)


class Gating:
    """Masks and gate gradients over local fragments.

    fragments: this rank's fragments of the gated group, gate parameters included; state: the optimizer's, made
    before; no_decay: tensors without weight decay. `unit_mask` is the mask of all structured units, shape
    (num_structured_units,), on this rank's device, the same on every rank.
    """

    def __init__(
        self,
        plan: GatePlan,
        fragments: Sequence[Fragment],
        state: State,
        communicator: Communicator,
        no_decay: Collection[str],
    ) -> None:
        self.plan = plan
        self.weights = [f for f in fragments if f.tensor in plan.covers and f.length]
        self.hosted_thresholds = [f for f in fragments if f.tensor == THRESHOLDS and f.length]
        self.hosted_scores = [f for f in fragments if f.tensor == SCORES and f.length]
        self._state = state
        self.communicator = communicator
        flats = {id(f.flat): f.flat for f in self.weights}
        owned = {key: [f for f in self.weights if id(f.flat) == key] for key in flats}
        self._parts = [Part(plan, flat, owned[key], no_decay) for key, flat in flats.items()]
        self._device = fragments[0].flat.device if fragments else torch.device("cpu")
        self._hybrid = any(map(plan.hybrid, plan.covers))
        self._element_key = ELEMENT_MASK if ELEMENT_MASK in state_keys(plan) else MASK
        self.unit_mask = torch.ones(plan.num_structured_units, dtype=torch.bool, device=self._device)
        self._spread: Tensor | None = None  # the unit masks that MASK holds now
        self._flips = Flips()
        self._own_units = torch.zeros_like(self.unit_mask)  # those whose scores are here
        structured = [0 if gate.elementwise else gate.num_units for gate in plan.gates]
        self._structured_units = torch.tensor(structured, dtype=torch.int64, device=self._device)  # of every gate
        self._ranked = [index for index, gate in enumerate(plan.gates) if gate.pattern is None]
        self._runs, fragment_gates = self._selection()
        num_units = [plan.gates[i].num_units for i in self._ranked]
        self._selector = Selector(num_units, fragment_gates, communicator, self._device)
        widest = max((gate.pattern[1] for gate in plan.gates if gate.pattern), default=1)
        self._pattern_selector = PatternSelector(list(self._pattern_runs()), widest, communicator, self._device)

    @property
    def extra_bytes(self) -> int:
        """Bytes of the state on this rank beyond dense AdamW's: latent weights, masks, scores and their moments."""
        states = {id(f.flat): self._state[f.flat] for f in self.weights}.values()
        kept = [value for state in states for key, value in state.items() if key not in (EXP_AVG, EXP_AVG_SQ)]
        return sum(value.numel() * value.element_size() for value in kept if isinstance(value, Tensor))

    def state(self, fragment: Fragment, key: str) -> Tensor:
        """This fragment's part of a state tensor, shape (length,)."""
        return fragment.view(self._state[fragment.flat][key])

    def _flat_states(self, part: Part, *keys: str) -> list[Tensor]:
        return [self._state[part.flat][key].view(-1) for key in keys]

    # The update

    def update_(self, adam: Adam) -> None:
        """AdamW on the latent weights with dL/dW = G * M."""
        for part in self._parts:
            if part.grad is not None:
                self._update_weights_(part.updated, part, part.grad, adam)

    def learn_(self, adam: Adam, score_adam: Adam) -> tuple[Tensor, Tensor]:
        """The same, and Adam on element scores.

        Returns (dL/dsigma on the CPU, dL/dS of structured units), float64, summed over ranks. With G = dL/d(W * M):
        dL/dS_u = sum_{i in u} G_i W_i prod_{g' != g} M_g',i and dL/dsigma = sum_u M_u dL/dS_u
        (algorithm.md, section 2).
        """
        num_gates = len(self.plan.gates)
        sums = torch.zeros(num_gates + self.plan.num_structured_units, dtype=torch.float64, device=self._device)
        for part in self._parts:
            if part.grad is not None:
                self._add_unit_sums(sums[num_gates:], part, part.grad)
                self._update_elements_(sums[:num_gates], part, part.grad, adam, score_adam)
                self._update_weights_(part.structured, part, part.grad, adam)
        sums = self.communicator.sum_(sums.float()).double()  # fp32, as the weights' gradients are reduced
        sigma, units = sums[:num_gates], sums[num_gates:]
        sigma += _segment_sums(units * self.unit_mask, self._structured_units)
        return sigma.cpu(), units

    def _update_weights_(self, table: Tensor, part: Part, grad: Tensor, adam: Adam) -> None:
        if len(table):
            ops.masked_adamw_(table, grad, *self._flat_states(part, MASK, LATENT, EXP_AVG, EXP_AVG_SQ), adam)

    def _add_unit_sums(self, sums: Tensor, part: Part, grad: Tensor) -> None:
        """Add a part's share of the gradients of structured units to `sums`."""
        (latent,) = self._flat_states(part, LATENT)
        if len(part.alone):
            sums += ops.unit_sums(part.alone, grad, latent, None, len(sums))
        for patches, rest in part.joint:
            others = self._times_units(self._element_masks(part), rest)
            sums += ops.unit_sums(patches, grad, latent, others, len(sums))

    def _update_elements_(self, sums: Tensor, part: Part, grad: Tensor, adam: Adam, score_adam: Adam) -> None:
        """One step of element scores and the latent weights under them; adds to dL/dsigma in `sums`."""
        if not len(part.elements):
            return
        keys = MASK, LATENT, EXP_AVG, EXP_AVG_SQ, SCORE, SCORE_EXP_AVG, SCORE_EXP_AVG_SQ
        mask, *states = self._flat_states(part, *keys)
        others = self._times_units(torch.ones_like(mask), part.patches) if part.joint else None
        sigma = ops.element_adamw_(part.elements, grad, part.hosted, mask, others, *states, adam, score_adam)
        sums += _segment_sums(sigma, part.num_rows)

    def _element_masks(self, part: Part) -> Tensor:
        """A copy of the element gates' own masks in a plan with hybrids, ones where there are none; bool, flat."""
        state = self._state[part.flat]
        if ELEMENT_MASK in state:
            return state[ELEMENT_MASK].view(-1).clone()
        return torch.ones(part.hosted.shape, dtype=torch.bool, device=part.device)

    def _times_units(self, mask: Tensor, patches: Tensor) -> Tensor:
        """The mask, flat, times those of the structured units on patches; in place."""
        ops.expand_units_(patches, self.unit_mask, None, mask)
        return mask

    def write_(self) -> None:
        """The hosted partition becomes W * M."""
        with self.communicator.stopwatch.measure("mask"):
            for part in self._parts:
                ops.write_masked_(part.updated, *self._flat_states(part, LATENT, MASK), part.hosted)

    # Scores from magnitude

    def magnitude_scores_(self, scaled: bool) -> None:
        """S_u = mean |W| over the unit's prunable weights; `scaled` divides by the mean over the gate.

        Biases follow their unit without a say. Used to start learned scores, and by the magnitude rule.
        """
        num_gates = len(self.plan.gates)
        sums = torch.zeros(num_gates + self.plan.num_structured_units, dtype=torch.float64, device=self._device)
        for fragment in self.weights:
            if not self.plan.counted(fragment.tensor):
                continue
            size = self.state(fragment, LATENT).abs()
            for cover in self.plan.covers[fragment.tensor]:
                if self.plan.gates[cover.gate].elementwise:
                    self.state(fragment, SCORE).copy_(size)
                else:
                    units = sums[num_gates:][self.plan.units(cover.gate)]
                    self._add_sums_(units, size, fragment, cover)
                if scaled:
                    sums[cover.gate] += size.sum(dtype=torch.float64)
        self.communicator.sum_(sums)
        self._write_magnitudes(sums[:num_gates], sums[num_gates:], scaled)

    def _add_sums_(self, units: Tensor, values: Tensor, fragment: Fragment, cover: Cover) -> None:
        local = torch.zeros_like(units)
        for part in cover.slices:
            add_unit_sums_(local, values, fragment.start, part)
        units += local

    def _write_magnitudes(self, totals: Tensor, units: Tensor, scaled: bool) -> None:
        """Turn sums of |W| over gates and units into scores."""
        gates = self.plan.gates
        means = [(t / g.num_weights).clamp(min=1e-30) for t, g in zip(totals, gates, strict=True)] if scaled else []
        for index in self.plan.structured:
            sizes = gates[index].unit_sizes.to(units.device, non_blocking=True)
            units[self.plan.units(index)] /= sizes * (means[index] if scaled else 1.0)
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
        sigma = torch.zeros(len(self.plan.gates), device=self._device)
        for fragment in self.hosted_thresholds:
            sigma[fragment.start : fragment.start + fragment.length] = fragment.view(fragment.flat)
        return self.communicator.sum_(sigma).cpu()

    def write_thresholds(self, sigma: Tensor) -> None:
        """Put new thresholds (G,) into the fragments that this rank holds."""
        for fragment in self.hosted_thresholds:
            own = sigma[fragment.start : fragment.start + fragment.length]
            fragment.view(fragment.flat).copy_(own, non_blocking=True)

    # Masks

    def make_masks(self, keep: Sequence[int]) -> None:
        """Set every mask to the top `keep` units of its gate by score, and MASK to their product."""
        with self.communicator.stopwatch.measure("select"):
            self._selector.masks_(self._runs, [keep[index] for index in self._ranked])
            self._make_patterns(keep)
            self.unit_mask = self.communicator.union(self._own_units)
        with self.communicator.stopwatch.measure("mask"):
            self.spread_masks()

    def _make_patterns(self, keep: Sequence[int]) -> None:
        """The masks of n:m gates, of whose every m neighbours the same number is kept."""
        if len(self._ranked) < len(keep):
            kept = [
                num * gate.pattern[1] // gate.num_units if gate.pattern else 0
                for num, gate in zip(keep, self.plan.gates, strict=True)
            ]
            self._pattern_selector.masks_(kept)

    def spread_masks(self) -> None:
        """MASK = product of the masks of all gates that cover an element, where it is not made in place."""
        new = self.unit_mask
        old = ~new if self._spread is None else self._spread
        for part in self._parts:
            (mask,) = self._flat_states(part, MASK)
            if self._hybrid:
                self._times_units(mask.copy_(self._element_masks(part)), part.patches)
            else:
                ops.expand_units_(part.patches, new, old, mask)
        self._spread = new

    def forget_masks(self) -> None:
        """MASK was changed from outside: write all of it the next time."""
        self._spread = None

    def _counted_masks(self) -> Iterator[Tensor]:
        """MASK where prunable weights lie on this rank: flat views, always the same."""
        for part in self._parts:
            (mask,) = self._flat_states(part, MASK)
            yield from (mask[run] for run in part.counted)

    def count_flips(self) -> int:
        """Prunable weights, on all ranks, whose MASK is another than when this was last called."""
        flips = torch.tensor(self._flips.count(self._counted_masks()), device=self._device)
        return int(self.communicator.sum_(flips).item())

    def count_kept(self) -> int:
        """Prunable weights that MASK keeps, on all ranks."""
        total = torch.zeros((), dtype=torch.int64, device=self._device)
        for mask in self._counted_masks():
            total += torch.count_nonzero(mask)
        return int(self.communicator.sum_(total).item())

    # Runs of scores, for the selection

    def score_runs(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(gate, scores, mask) of every run on this rank, each of its length; n:m gates rank no units: left out."""
        for scores, mask, offset, length, gate, _ in (*self._element_runs(), *self._unit_runs()):
            own = slice(offset, offset + length)
            yield gate, scores.detach().view(-1)[own], mask.view(-1)[own]

    def _selection(self) -> tuple[list[Runs], list[int]]:
        """The local runs of scores, and the gate of every run of all ranks, by place."""
        local = [*self._element_runs(), *self._unit_runs()]
        everywhere = self.communicator.gather([(gate, start) for *_, gate, start in local])
        places = sorted(place for rank in everywhere for place in rank)
        order = {place: number for number, place in enumerate(places)}
        number = {gate: position for position, gate in enumerate(self._ranked)}
        buffers = {(id(scores), id(mask)): (scores, mask) for scores, mask, *_ in local}
        runs = []
        for key, (scores, mask) in buffers.items():
            mine = [entry for entry in local if (id(entry[0]), id(entry[1])) == key]
            rows = [(offset, num, number[gate], order[gate, start]) for _, _, offset, num, gate, start in mine]
            runs.append((scores, mask, rows))
        made = [
            Runs(scores.detach().view(-1), mask.view(-1), run_table(rows, ops.row_size(self._device)).to(self._device))
            for scores, mask, rows in runs
        ]
        return made, [number[gate] for gate, _ in places]

    def _element_runs(self) -> Iterator[tuple[Tensor, Tensor, int, int, int, int]]:
        """(scores, mask, offset in both, length, gate, first unit) of every run of element scores on this rank."""
        for fragment in self.weights:
            for cover in self.plan.covers[fragment.tensor]:
                gate, states = self.plan.gates[cover.gate], self._state[fragment.flat]
                if gate.elementwise and gate.pattern is None:
                    mask = states[self._element_key]
                    yield states[SCORE], mask, fragment.offset, fragment.length, cover.gate, fragment.start

    def _unit_runs(self) -> Iterator[tuple[Tensor, Tensor, int, int, int, int]]:
        """The same of structured scores; their mask goes to this rank's share of the units."""
        for fragment in self.hosted_scores:
            scores = fragment.view(fragment.flat)
            mask = self._own_units[fragment.start : fragment.start + fragment.length]
            for index in self.plan.structured:
                units = self.plan.units(index)
                first = max(units.start, fragment.start)
                last = min(units.stop, fragment.start + fragment.length)
                if first < last:
                    yield scores, mask, first - fragment.start, last - first, index, first - units.start

    def _pattern_runs(self) -> Iterator[PatternRun]:
        """The runs of scores under n:m gates on this rank."""
        for f in self.weights:
            states = self._state[f.flat]
            for cover in self.plan.covers[f.tensor]:
                if pattern := self.plan.gates[cover.gate].pattern:
                    scores, mask = states[SCORE], states[self._element_key]
                    yield PatternRun(cover.gate, f.start, f.length, pattern[1], scores, mask, f.offset)


def _segment_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """The sums of runs of values that follow each other, shape of their lengths; no host sync."""
    return torch.segment_reduce(values, "sum", lengths=lengths, initial=0.0, unsafe=True)
