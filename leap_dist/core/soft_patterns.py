"""Rule "gumbel" under n:m gates: every group of m neighbours chooses one of its patterns, softly (ops/soft.py).

A group that two ranks share is computed by both, from a small table that holds its scores and products.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from leap_dist.core.gating import LATENT, SCORE, SCORE_EXP_AVG, SCORE_EXP_AVG_SQ, Gating
from leap_dist.core.masks import pattern_runs
from leap_dist.core.parts import Part
from leap_dist.core.pattern import PatternRun, ends_of, shared_slots
from leap_dist.ops.reference import Adam, adamw_
from leap_dist.ops.soft import Curve, at_once, choice_gradient, choose, chosen_masks, patterns_of

MOST = 100  # patterns of a group: 4:8 has 70, 8:16 would have 12,870


class SoftPatterns:
    """The n:m gates over the fragments of one rank; collective, also at the start."""

    def __init__(self, gating: Gating) -> None:
        self._gating, gates = gating, gating.plan.gates
        pairs = {index: gate.pattern for index, gate in enumerate(gates) if gate.pattern}
        self._patterns = {index: patterns_of(*pair, gating.device) for index, pair in pairs.items()}
        widest = max(of for _, of in pairs.values())
        self._slot = shared_slots(list(pattern_runs(gating)), widest, gating.communicator)
        self._num_shared = len(self._slot) * widest
        self._whole: dict[Tensor, list[tuple[slice, int, int]]] = {}
        self._ends: dict[Tensor, tuple[Tensor, Tensor]] = {}
        for part in gating.parts:
            runs = list(pattern_runs(gating, part.flat))
            self._whole[part.flat] = [block for run in runs for block in self._blocks(run)]
            self._ends[part.flat] = ends_of(runs, self._slot, gating.device)
        self._own = {(run.gate, element // run.of) for run in pattern_runs(gating) for element, _ in run.ends()}

    def _blocks(self, run: PatternRun) -> list[tuple[slice, int, int]]:
        """The whole groups of a run: (place in the flat partition, gate, number of the first group), cut to blocks."""
        first, length = run.body
        size = at_once(self._gating.device) // len(self._patterns[run.gate]) * run.of
        return [
            (
                slice(run.offset + first + i, run.offset + first + min(i + size, length)),
                run.gate,
                (run.start + first + i) // run.of,
            )
            for i in range(0, length, size)
        ]

    def _chosen(self, score: Tensor, gate: int, first: int, curve: Curve) -> tuple[Tensor, Tensor]:
        """(y, the patterns of the gate) of scores, flat."""
        patterns = self._patterns[gate]
        return choose(score.view(-1, patterns.shape[1]), patterns, gate, first, curve), patterns

    def _share(self, values: Sequence[tuple[Part, Tensor]]) -> Tensor:
        """The table of all groups that ranks share; `values`: those of a part's elements in such groups. Collective."""
        shared = torch.zeros(self._num_shared, device=self._gating.device)
        for part, of_ends in values:
            shared[self._ends[part.flat][1]] = of_ends
        return self._gating.communicator.sum_(shared)

    def _parts(self) -> list[Part]:
        """Those with n:m gates."""
        return [p for p in self._gating.parts if self._whole[p.flat] or len(self._ends[p.flat][0])]

    def write_(self, curve: Curve) -> None:
        """hosted = W * M. Collective."""
        flat = {part.flat: self._gating.flat_states(part, LATENT, SCORE) for part in self._parts()}
        scores = self._share([(p, flat[p.flat][1][self._ends[p.flat][0]]) for p in self._parts()])
        masks = torch.empty_like(scores)
        for gate, group in self._own:
            b = self._slots(gate, group)
            chosen, patterns = self._chosen(scores[b], gate, group, curve)
            masks[b] = chosen_masks(chosen, patterns)
        for part in self._parts():
            latent, score = flat[part.flat]
            for b, gate, group in self._whole[part.flat]:
                chosen, patterns = self._chosen(score[b], gate, group, curve)
                part.hosted[b] = latent[b] * chosen_masks(chosen, patterns)
            ends, slots = self._ends[part.flat]
            part.hosted[ends] = (latent[ends] * masks[slots]).to(part.hosted.dtype)

    def _slots(self, gate: int, group: int) -> slice:
        first = self._slot[gate, group]
        return slice(first, first + self._patterns[gate].shape[1])

    def learn_(self, curve: Curve, adam: Adam) -> dict[Tensor, Tensor]:
        """A step of the scores, with M as in the forward pass; by part M, flat, 0 outside n:m gates. Collective."""
        scores, products = self._share_scores_and_products()
        masks, gradients = torch.empty_like(scores), torch.empty_like(scores)
        for gate, group in self._own:
            b = self._slots(gate, group)
            masks[b], gradients[b] = self._gradient(scores[b], products[b], gate, group, curve)
        found = {}
        for part in self._parts():
            if part.grad is None:
                continue
            latent, score, first, second = self._gating.flat_states(
                part, LATENT, SCORE, SCORE_EXP_AVG, SCORE_EXP_AVG_SQ
            )
            mask = found[part.flat] = torch.zeros_like(latent)
            for b, gate, group in self._whole[part.flat]:
                mask[b], gradient = self._gradient(score[b], part.grad[b] * latent[b], gate, group, curve)
                adamw_(score[b], gradient, first[b], second[b], adam)
            ends, slots = self._ends[part.flat]
            mask[ends] = masks[slots]
            own, own_first, own_second = score[ends], first[ends], second[ends]
            adamw_(own, gradients[slots], own_first, own_second, adam)
            score[ends], first[ends], second[ends] = own, own_first, own_second
        return found

    def _share_scores_and_products(self) -> tuple[Tensor, Tensor]:
        """P and G W of the groups that ranks share. Collective."""
        scores, products = [], []
        for part in self._parts():
            ends = self._ends[part.flat][0]
            latent, score = self._gating.flat_states(part, LATENT, SCORE)
            scores.append((part, score[ends]))
            if part.grad is not None:
                products.append((part, part.grad[ends] * latent[ends]))
        return self._share(scores), self._share(products)

    def _gradient(self, score: Tensor, product: Tensor, gate: int, first: int, curve: Curve) -> tuple[Tensor, Tensor]:
        """(M, dL/dP), flat."""
        chosen, patterns = self._chosen(score, gate, first, curve)
        gradient = choice_gradient(chosen, product.view(-1, patterns.shape[1]), patterns, curve)
        return chosen_masks(chosen, patterns), gradient
