"""Rule "gumbel": masks that are soft while they are learned (Mozaffari et al., arXiv 2605.17289; MaskLLM).

M = sigmoid((alpha P + b + g) / tau) with scores P, logistic noise g, and schedules that are linear over the prune
phase; under n:m gates a group chooses among its patterns instead (soft_patterns.py). The hosted weights are W * M after
every step; dL/dP follows from their gradient alone, with the noise drawn again (ops/soft.py). What is ours: one bias b
for all gates holds the mean of M at the scheduled level (control "projected"; under "paper" b is 0 and the published
regulariser pulls), and where masks become final the best scores of the whole model are kept, exactly as many as the
target says.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leap_dist.config.leap import LeapConfig
from leap_dist.core.gates import GatePlan
from leap_dist.core.gating import EXP_AVG, EXP_AVG_SQ, LATENT, MASK, SCORE, SCORE_EXP_AVG, SCORE_EXP_AVG_SQ, Gating
from leap_dist.core.parts import Part
from leap_dist.core.phases import Schedule
from leap_dist.core.soft_patterns import MOST, SoftPatterns
from leap_dist.core.thresholds import bisect
from leap_dist.core.update import move_, segment_sums
from leap_dist.errors import UserError
from leap_dist.ops import dispatch as ops
from leap_dist.ops.reference import GATE, Adam, runs_of
from leap_dist.ops.slices import expand_units
from leap_dist.ops.soft import (
    SUMS,
    Curve,
    at_once,
    noise_key,
    noise_keys,
    normal,
    numbered_table,
    soft_masks,
)
from leap_dist.ops.units import patches_of

ALPHA, TAU = (25.0, 350.0), (4.0, 0.05)  # at the start and at the end of the prune phase, as published
CHOICE = (100.0, 500.0)  # alpha where patterns are chosen, as published (MaskLLM)
SPREAD, PRIOR = 0.014, 3.0  # scores start at SPREAD (N(0, 1) +- PRIOR), + where the first mask keeps; as published
MEAN_PULL, NORM_PULL = 7.0, 10.0  # weights of the published regulariser's two parts
NEAR = 1e-2  # of the level: how far the mean of M may be from it
REACH, PASSES = 8.0, 30  # of the search for the bias: its longest step, and its end
DRAWN_AT_START = -1  # in place of a step, in the key of the noise


def check_soft(plan: GatePlan, config: LeapConfig) -> None:
    """Raise UserError for gates that rule "gumbel" does not know."""
    if config.rule != "gumbel":
        return
    several = next((tensor for tensor in plan.covers if plan.hybrid(tensor)), None)
    if several is not None:
        kinds = dict.fromkeys(plan.gates[cover.gate].granularity for cover in plan.covers[several])
        what = f"{several} has several ({', '.join(kinds)}); give one granularity"
        if len(kinds) == 1:
            what = f'"{next(iter(kinds))}" prunes {several} by rows and by columns; give another granularity'
        raise UserError(f'leap.rule: got "gumbel", which takes one gate a tensor, but {what}, or use rule "leap"')
    for gate in plan.gates:
        if gate.pattern and math.comb(gate.pattern[1], gate.pattern[0]) > MOST:
            raise UserError(
                f'leap.rule: got "gumbel", which chooses among all patterns of a group; {gate.granularity} has '
                f"{math.comb(gate.pattern[1], gate.pattern[0])}; allowed: at most {MOST}, such as 2:4 or 4:8"
            )
    coarse = [gate.granularity for gate in plan.gates if gate.granularity != "element"]
    if coarse and config.control == "paper":
        raise UserError(
            f'leap.control: got "paper"; rule "gumbel" has the published regulariser for single weights alone, and '
            f'{coarse[0]} is in leap.gates; use "projected"'
        )


def curve_at(schedule: Schedule, step: int, bias: float, seed: int) -> Curve:
    """The curve of the forward pass of a step."""
    length = max(schedule.settle_start - schedule.dense_end, 1)
    done = min(max((step - schedule.dense_end) / length, 0.0), 1.0)
    alpha, tau, choice = (start + (end - start) * done for start, end in (ALPHA, TAU, CHOICE))
    return Curve(alpha, tau, bias, noise_key(seed, step), choice)


class Rest(NamedTuple):
    """How much is kept outside n:m gates, which keep `kept` of their weights from the start; `num` weights are left."""

    kept: int
    num: int
    prunable: int
    target: float

    def level(self, level: float) -> float:
        """The density of the rest, which falls to its own target as the level falls to the whole model's."""
        own = (self.target * self.prunable - self.kept) / max(self.num, 1)
        return 1.0 - (1.0 - level) * (1.0 - own) / (1.0 - self.target)

    def whole(self, level: float) -> float:
        """That of the whole model then."""
        return (self.level(level) * self.num + self.kept) / self.prunable


def rest_of(plan: GatePlan, target: float) -> Rest:
    """What is outside of a plan's n:m gates."""
    patterned = [gate for gate in plan.gates if gate.pattern]
    num = sum(gate.num_units for gate in patterned)
    return Rest(sum(gate.lowest for gate in patterned), plan.prunable - num, plan.prunable, target)


def find_bias(evaluate: Callable[[float], tuple[float, float]], level: float, bias: float) -> float:
    """The bias with which the mean of M is `level`, to a hundredth of it: Newton's method inside a bracket.

    evaluate: bias -> (mean of M, its slope); the last call is with what is returned.
    """
    low, high = -math.inf, math.inf
    for _ in range(PASSES):
        mean, slope = evaluate(bias)
        if abs(mean - level) <= NEAR * level:
            return bias
        low, high = (bias, high) if mean < level else (low, bias)
        goal = bias + min(max((level - mean) / max(slope, 1e-12), -REACH), REACH)
        bias = goal if low < goal < high else 0.5 * (low + high)
    evaluate(bias)
    return bias


def pulls_of(
    sums: Tensor, mean: float, num_weights: float, target: float, left: float
) -> tuple[list[tuple[float, float]], float]:
    """What the published regulariser adds to dL/dM, (c, d) of every gate as `learn_soft_` takes them, and its value.

        7 |mean M - target| - 10 left sum_g ||M W||_g / sum_g ||W||_g

    sums: as `write_soft_` returns them, of all ranks; left: the part of the prune phase that is left.
    """
    masked, whole = sums[:, 2].sqrt(), sums[:, 3].sqrt().sum().item()
    value = MEAN_PULL * abs(mean - target) - NORM_PULL * left * masked.sum().item() / max(whole, 1e-30)
    constant = MEAN_PULL * math.copysign(1.0, mean - target) / num_weights
    shares = (-NORM_PULL * left / (masked * whole).clamp(min=1e-30)).tolist()
    return [(constant, share) for share in shares], value


def first_scores(kept: Tensor | None, gate: int, first: int, seed: int, like: Tensor) -> Tensor:
    """Where scores start, of the shape of `like`: by a mask, or without one."""
    drawn = normal(noise_key(seed, DRAWN_AT_START, gate), first, len(like), like.device)
    if kept is not None:
        drawn += PRIOR * (2.0 * kept.float() - 1.0)
    return drawn.mul_(SPREAD)


class Soft:
    """Soft masks over the fragments of one rank. `on`: whether the hosted weights are W * M now."""

    def __init__(self, gating: Gating, config: LeapConfig, schedule: Schedule, seed: int) -> None:
        self._gating, self._config, self._schedule, self._seed = gating, config, schedule, seed
        plan = gating.plan
        self._starts = {
            part.flat: numbered_table(
                [
                    (f.offset, f.length, plan.covers[f.tensor][0].gate, f.start)
                    for f in gating.weights
                    if f.flat is part.flat and plan.gates[plan.covers[f.tensor][0].gate].elementwise
                ],
                min(ops.row_size(gating.device), at_once(gating.device)),
            ).to(gating.device)
            for part in gating.parts
        }
        free = torch.tensor([not gate.pattern for gate in plan.gates], device=gating.device)
        self._runs = {flat: rows[free[rows[:, GATE]]] for flat, rows in self._starts.items()}
        self._num_rows = {f: torch.bincount(rows[:, GATE], minlength=len(free)) for f, rows in self._runs.items()}
        patterned = any(gate.pattern for gate in plan.gates)
        self._patterns = SoftPatterns(gating) if patterned else None
        self._rest = rest_of(plan, config.target)
        sizes = [plan.gates[i].unit_sizes.double() for i in plan.structured]
        self._sizes = torch.cat([torch.zeros(0, dtype=torch.float64), *sizes]).to(gating.device)
        self.on, self.mean = False, 1.0
        self._step, self._bias = 0, 0.0
        self._loaded = False  # whether sums over masks are still those from before a checkpoint was loaded
        self._pulls = torch.zeros(len(plan.gates), 2, device=gating.device)
        self._key_of, self._keys = -1, torch.zeros(0, dtype=torch.int64)
        self.regulariser: dict[str, float] = {}

    @property
    def _curve(self) -> Curve:
        return curve_at(self._schedule, self._step, self._bias, self._seed)

    def first_shares(self) -> Tensor:
        """Keep ratios of the masks that scores start from, float64 of shape (G,)."""
        rest, gates = self._rest.level(self._config.target), self._gating.plan.gates
        shares = [pair[0] / pair[1] if (pair := gate.pattern) else rest for gate in gates]
        return torch.tensor(shares, dtype=torch.float64)

    def start_(self) -> None:
        """Scores from the masks that are in place, which are made by what scores start from. Local."""
        gating, by_mask = self._gating, self._config.score_init != "zero"
        for part in gating.parts:
            if not len(rows := self._starts[part.flat]):
                continue
            mask, score = gating.flat_states(part, MASK, SCORE)
            for offset, length, gate, first in rows.tolist():
                b = slice(offset, offset + length)
                score[b] = first_scores(mask[b] if by_mask else None, gate, first, self._seed, score[b])
        for f in gating.own_scores:
            kept = gating.unit_mask[f.start : f.start + f.length] if by_mask else None
            own = f.view(f.flat)
            own.copy_(first_scores(kept, len(gating.plan.gates), f.start, self._seed, own))

    # A step

    def hold_(self, step: int, level: float) -> None:
        """The masks of the forward pass of a step, of which `level` are kept in the mean. Collective."""
        self.on, self._step = True, step
        if self._patterns:
            self._patterns.write_(self._curve)
        if self._config.control == "projected" and self._rest.num:
            self._bias = find_bias(self._evaluate, self._rest.whole(level), self._bias)
        else:
            self._evaluate(0.0)

    def write_(self) -> None:
        """Hosted weights as the last `hold_` left them. Collective."""
        if self._patterns:
            self._patterns.write_(self._curve)
        self._evaluate(self._bias)

    def _evaluate(self, bias: float) -> tuple[float, float]:
        """Hosted weights outside n:m gates, by a bias; (mean of M over all, its slope)."""
        gating, plan = self._gating, self._gating.plan
        self._loaded = False
        self._bias, curve = bias, curve_at(self._schedule, self._step, bias, self._seed)
        sums = torch.zeros(len(plan.gates), SUMS, dtype=torch.float64, device=gating.device)
        units = self._unit_masks(curve)
        for part in gating.parts:
            (latent,) = gating.flat_states(part, LATENT)
            if len(rows := self._runs[part.flat]):
                (score,) = gating.flat_states(part, SCORE)
                found = ops.write_soft_(rows, self._noise(curve), latent, score, part.hosted, curve.scalars())
                sums += segment_sums(found, self._num_rows[part.flat])
            self._times_units(part, units, latent, part.hosted)
        sums = gating.communicator.sum_(sums)
        slopes = units * (1.0 - units) / curve.tau
        kept = sums[:, 0].sum() + self._sizes @ units.double()
        mean = (self._rest.kept + kept.item()) / plan.prunable
        slope = (sums[:, 1].sum() + self._sizes @ slopes.double()).item() / plan.prunable
        self.mean = mean
        if self._config.control == "paper":
            left = 1.0 - (curve.alpha - ALPHA[0]) / (ALPHA[1] - ALPHA[0])
            pulls, value = pulls_of(sums, mean, plan.prunable, self._config.target, left)
            self._pulls, self.regulariser = torch.tensor(pulls, device=gating.device), {"loss_reg": value}
        return mean, slope

    def _noise(self, curve: Curve) -> Tensor:
        """The keys of a step's noise, made once."""
        if self._key_of != curve.key:
            self._key_of = curve.key
            self._keys = noise_keys(curve.key, len(self._gating.plan.gates), self._gating.device)
        return self._keys

    def _unit_masks(self, curve: Curve) -> Tensor:
        """M of all structured units, fp32 of shape (num_structured_units,), the same on every rank. Collective."""
        return soft_masks(self._unit_scores(), len(self._gating.plan.gates), 0, curve)

    def _unit_scores(self) -> Tensor:
        """P of all structured units. Collective."""
        gating = self._gating
        scores = torch.zeros(gating.plan.num_structured_units, device=gating.device)
        for f in gating.own_scores:
            scores[f.start : f.start + f.length] = f.view(f.flat)
        return gating.communicator.sum_(scores)

    def _times_units(self, part: Part, units: Tensor, values: Tensor, out: Tensor) -> None:
        """out = values * M where structured units lie; flat."""
        for b, _, _ in runs_of(part.structured):
            out[b] = values[b]
        for offset, start, length, piece in patches_of(part.patches):
            b = slice(offset, offset + length)
            out[b] *= expand_units(units, torch.ones_like(values[b]), start, piece)

    def learn_(self, adam: Adam | None, score_adam: Adam, unit_adam: Adam) -> None:
        """A step of the scores, and of the latent weights where they are trained. Collective."""
        if self._loaded:
            self.write_()
        gating, curve = self._gating, self._curve
        units = self._unit_masks(curve)
        patterned = self._patterns.learn_(curve, score_adam) if self._patterns else {}
        sums = torch.zeros(len(units), dtype=torch.float64, device=gating.device)
        for part in gating.parts:
            grad = part.grad
            if grad is None:
                continue
            (latent,) = gating.flat_states(part, LATENT)
            masked = None if adam is None else torch.zeros_like(grad)
            if len(part.alone):
                sums += ops.unit_sums(part.alone, grad, latent, None, len(sums))
            if len(rows := self._runs[part.flat]):
                score, first, second = gating.flat_states(part, SCORE, SCORE_EXP_AVG, SCORE_EXP_AVG_SQ)
                states = grad, latent, score, first, second, masked
                ops.learn_soft_(rows, self._noise(curve), *states, curve.scalars(), self._pulls, score_adam)
            if adam is not None and masked is not None:
                self._times_units(part, units, grad, masked)
                if part.flat in patterned:
                    masked.addcmul_(grad, patterned[part.flat])
                own = gating.flat_states(part, MASK, LATENT, EXP_AVG, EXP_AVG_SQ)  # MASK is all ones by now
                ops.masked_adamw_(part.updated, masked, *own, adam)
        sums = gating.communicator.sum_(sums.float()).double()
        move_(gating, gating.own_scores, sums * units * (1.0 - units) * (curve.alpha / curve.tau), unit_adam)

    # The end

    def thresholds(self, temperature: float, target: float) -> Tensor:
        """Where sigma stands if the best scores of all gates together are kept, (G,), fp32. Collective.

        Gates that share a threshold have one share; those of n:m gates are not learned.
        """
        plan = self._gating.plan
        if not self._rest.num:
            return self._gating.gather_thresholds()
        cut = self._cut(target * plan.prunable - self._rest.kept)
        kept = self._kept_above(cut)[0]
        shares = torch.zeros(len(plan.gates), dtype=torch.float64)
        for group in plan.tied:
            num_units = sum(plan.gates[i].num_units for i in group)
            shares[list(group)] = kept[list(group)].sum() / num_units
        return (torch.logit(shares.clamp(1e-9, 1.0 - 1e-9)) * temperature).float()

    def _cut(self, goal: float) -> float:
        """The largest score above which at least `goal` prunable weights are kept."""
        gating = self._gating
        mine = [gating.flat_states(part, SCORE)[0] for part in gating.parts if len(self._runs[part.flat])]
        bounds = [(t.min().item(), t.max().item()) for t in (*mine, *(f.view(f.flat) for f in gating.own_scores))]
        everywhere = [pair for rank in gating.communicator.gather(bounds) for pair in rank]
        low, high = min(a for a, _ in everywhere), max(b for _, b in everywhere)
        low, _ = bisect(lambda cut: self._kept_above(cut)[1] >= goal, low - 1.0, high, num_steps=48)
        return low

    def _kept_above(self, cut: float) -> tuple[Tensor, float]:
        """(units of every gate whose score is above a cut, float64 of shape (G,) on the CPU; their weights)."""
        gating, plan = self._gating, self._gating.plan
        kept = torch.zeros(len(plan.gates), dtype=torch.float64, device=gating.device)
        for part in gating.parts:
            for offset, length, gate, _ in self._runs[part.flat].tolist():
                (score,) = gating.flat_states(part, SCORE)
                kept[gate] += torch.count_nonzero(score[offset : offset + length] > cut)
        kept = gating.communicator.sum_(kept)
        weights = kept.sum().item()
        above = self._unit_scores() > cut
        for index in plan.structured:
            kept[index] = above[plan.units(index)].sum()
        return kept.cpu(), weights + (self._sizes @ above.double()).item()

    # Checkpoints

    def plain_state(self) -> dict[str, float]:
        """What a checkpoint has to hold; empty where no soft masks are in place."""
        return {"step": float(self._step), "bias": self._bias} if self.on else {}

    def load_plain_state(self, saved: Mapping[str, Any]) -> None:
        """Continue from `plain_state()`; the states of all fragments are put in place before the next step."""
        self.on = self._loaded = bool(saved)
        self._step, self._bias = int(saved.get("step", 0)), float(saved.get("bias", 0.0))
