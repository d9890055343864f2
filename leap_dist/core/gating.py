"""Gating: the gates of a model over the fragments that one rank holds.

It turns the gradient of the masked weights into gradients of scores and thresholds, and kept counts into masks.
"""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from leap_dist.core.communicator import Communicator
from leap_dist.core.fragments import Fragment, add_unit_sums_, expand_units
from leap_dist.core.gates import Cover, GatePlan
from leap_dist.core.parts import Part
from leap_dist.ops import dispatch as ops
from leap_dist.ops.pattern import PatternRun, PatternSelector
from leap_dist.ops.reference import GATE, Adam, run_table
from leap_dist.ops.select import Runs, Selector

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
    before; no_decay: tensors without weight decay. `unit_mask` is the mask of all structured units, shape
    (num_structured_units,), the same on every rank.
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
        self._communicator = communicator
        flats = {id(f.flat): f.flat for f in self.weights}
        owned = {key: [f for f in self.weights if id(f.flat) == key] for key in flats}
        self._parts = [Part(plan, flat, owned[key], no_decay) for key, flat in flats.items()]
        self._device = fragments[0].flat.device if fragments else torch.device("cpu")
        self.unit_mask = torch.ones(plan.num_structured_units, dtype=torch.bool)
        self._spread: Tensor | None = None  # the unit masks that MASK holds now
        self._own_units = torch.zeros_like(self.unit_mask, device=self._device)  # those whose scores are here
        self._ranked = [index for index, gate in enumerate(plan.gates) if gate.pattern is None]
        self._runs, fragment_gates = self._selection()
        num_units = [plan.gates[i].num_units for i in self._ranked]
        self._selector = Selector(num_units, fragment_gates, communicator, self._device)
        self._patterned = self._pattern_fragments()
        widest = max((gate.pattern[1] for gate in plan.gates if gate.pattern), default=1)
        self._pattern_selector = PatternSelector([run for run, _ in self._patterned], widest, communicator)

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

        Returns (dL/dsigma, dL/dS of structured units), float64, summed over ranks, on the CPU. With G = dL/d(W * M):
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
        sums = self._communicator.sum_(sums).cpu()
        sigma, units = sums[:num_gates], sums[num_gates:]
        for index in self.plan.structured:
            where = self.plan.units(index)
            sigma[index] = units[where][self.unit_mask[where]].sum()
        return sigma, units

    def _update_weights_(self, table: Tensor, part: Part, grad: Tensor, adam: Adam) -> None:
        if len(table):
            ops.masked_adamw_(table, grad, *self._flat_states(part, MASK, LATENT, EXP_AVG, EXP_AVG_SQ), adam)

    def _add_unit_sums(self, sums: Tensor, part: Part, grad: Tensor) -> None:
        """Add a part's share of the gradients of structured units to `sums`."""
        (latent,) = self._flat_states(part, LATENT)
        if part.patches:
            sums += ops.unit_sums(torch.cat(list(part.patches.values())), grad, latent, None, len(sums))
        depth = max((len(self.plan.covers[f.tensor]) for f in part.hybrid), default=0)
        for number in range(depth):
            structured = [
                f for f in part.hybrid if number < len(self.plan.covers[f.tensor]) and number != part.element_cover(f)
            ]
            others = self._others(part, [(f, number) for f in structured])
            sums += ops.unit_sums(part.patch_table(structured, number), grad, latent, others, len(sums))

    def _update_elements_(self, sums: Tensor, part: Part, grad: Tensor, adam: Adam, score_adam: Adam) -> None:
        """One step of element scores and the latent weights under them; adds to dL/dsigma in `sums`."""
        weights = LATENT, EXP_AVG, EXP_AVG_SQ
        keys = MASK, *weights, SCORE, SCORE_EXP_AVG, SCORE_EXP_AVG_SQ
        for table in (part.elements, part.hybrids):
            if not len(table):
                continue
            mask, *states = self._flat_states(part, *keys)
            shared = [(f, number) for f in part.hybrid if (number := part.element_cover(f)) is not None]
            others = self._others(part, shared) if table is part.hybrids else None
            sigma = ops.element_adamw_(table, grad, part.hosted, mask, others, *states, adam, score_adam)
            num_rows = torch.zeros(len(sums), dtype=torch.int64, device=part.device)
            num_rows.index_add_(0, table[:, GATE], torch.ones_like(table[:, GATE]))
            sums += torch.segment_reduce(sigma, "sum", lengths=num_rows, initial=0.0, unsafe=True)  # no host sync

    def _others(self, part: Part, covers: Sequence[tuple[Fragment, int]]) -> Tensor:
        """For every (fragment, cover) the product of the masks of its other gates, in a flat bool buffer."""
        others = torch.empty(part.hosted.shape, dtype=torch.bool, device=part.device)
        for fragment, number in covers:
            fragment.view(others).copy_(self._product(fragment, number))
        return others

    def write_(self) -> None:
        """The hosted partition becomes W * M."""
        with self._communicator.stopwatch.measure("mask"):
            for part in self._parts:
                ops.write_masked_(part.updated, *self._flat_states(part, LATENT, MASK), part.hosted)

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
                    self._add_sums_(units, size, fragment, cover)
                sums[cover.gate] += size.sum(dtype=torch.float64).cpu() if scaled else 0.0
        self._communicator.sum_(sums)
        self._write_magnitudes(sums[:num_gates], sums[num_gates:], scaled)

    def _add_sums_(self, units: Tensor, values: Tensor, fragment: Fragment, cover: Cover) -> None:
        local = torch.zeros(units.shape, dtype=torch.float64, device=values.device)
        for part in cover.slices:
            add_unit_sums_(local, values, fragment.start, part)
        units += local.to(units.device)

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
        with self._communicator.stopwatch.measure("select"):
            self._selector.masks_(self._runs, [keep[index] for index in self._ranked])
            self._make_patterns(keep)
            units = self._own_units.to(torch.uint8)
            self.unit_mask = self._communicator.sum_(units).bool().cpu()
        with self._communicator.stopwatch.measure("mask"):
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
        """MASK = product of the masks of all gates that cover an element, where it is not made in place.

        Tensors that one structured gate covers alone are written where their gate's mask has changed.
        """
        old, new = self._spread, self.unit_mask
        where = {gate: self.plan.units(gate) for gate in self.plan.structured}
        changed = [gate for gate, at in where.items() if old is None or not torch.equal(old[at], new[at])]
        for part in self._parts:
            (mask,) = self._flat_states(part, MASK)
            if patches := [part.patches[gate] for gate in changed if gate in part.patches]:
                ops.expand_units_(torch.cat(patches), new.to(part.device), mask)
            for fragment in part.hybrid:
                fragment.view(mask).copy_(self._product(fragment))
        self._spread = new

    def forget_masks(self) -> None:
        """MASK was changed from outside: write all of it the next time."""
        self._spread = None

    def count_kept(self) -> int:
        """Prunable weights that MASK keeps, on all ranks."""
        counted = [f for f in self.weights if self.plan.counted(f.tensor)]
        kept = [torch.count_nonzero(self.state(f, MASK)) for f in counted]
        total = torch.stack(kept).sum() if kept else torch.zeros((), dtype=torch.int64)
        return int(self._communicator.sum_(total).item())

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

    def _product(self, fragment: Fragment, without: int | None = None) -> Tensor:
        """The product of the masks of the gates on a fragment, `without` one of its covers."""
        product = torch.ones(fragment.length, dtype=torch.bool, device=fragment.flat.device)
        for number, cover in enumerate(self.plan.covers[fragment.tensor]):
            if number != without:
                product &= self._own_mask(fragment, cover)
        return product

    # Runs of scores, for the selection

    def _selection(self) -> tuple[list[Runs], list[int]]:
        """The local runs of scores, and the gate of every run of all ranks, by place."""
        local = [*self._element_runs(), *self._unit_runs()]
        everywhere = self._communicator.gather([(gate, start) for *_, gate, start in local])
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
                    mask = states[ELEMENT_MASK if self.plan.hybrid(fragment.tensor) else MASK]
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

    def _pattern_fragments(self) -> list[tuple[PatternRun, Fragment]]:
        """The runs of scores under n:m gates on this rank, and whose they are."""
        found = []
        for fragment in self.weights:
            for cover in self.plan.covers[fragment.tensor]:
                if pattern := self.plan.gates[cover.gate].pattern:
                    scores = self.state(fragment, SCORE)
                    found.append((PatternRun(cover.gate, fragment.start, scores, pattern[1]), fragment))
        return found
