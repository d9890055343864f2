"""Thresholds: keep ratio, remaining ratio R, the regulariser, and the projection onto an exact level.

Everything here works on a few numbers in float64, the same on every rank. Symbols as in Yao et al., arXiv
2105.14636: threshold sigma, temperature T, k(sigma) = sigmoid(sigma / T), remaining ratio R, L_reg, lambda.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from leap_dist.core.gates import GatePlan
from leap_dist.core.measure import Measure

START = 5.0  # sigma starts at 5 T: k = 0.9933
CALIBRATIONS = 1e-3, 1e3  # the least and the greatest density / R
RATIO = 4.0  # the regulariser's gradient against the task's, until the target is near
LANDING = 4.0  # memories of the threshold's Adam, 1 / (1 - beta1) steps each, over which R comes to rest
SATURATED = 40.0  # beyond sigma = 40 T a keep ratio is 1 in float64, so no shift has to go further
CountWeights = Callable[[list[int]], float]  # kept counts of all gates -> what is kept, as the measure counts it


def keep_ratio(sigma: Tensor, temperature: float) -> Tensor:
    """k = sigmoid(sigma / T), float64, shape of sigma."""
    return torch.sigmoid(sigma.double() / temperature)


class Remaining:
    """R = (1/N) sum_t n_t prod_{g covers t} k_g, the regulariser built on it, and the kept counts that k asks for.

    `free` is 1 for gates whose ratio is learned and 0 for those with an n:m pattern, float64 of shape (G,).
    total: what the measure counts of all that gates cover.
    """

    def __init__(self, plan: GatePlan, measure: Measure | None = None) -> None:
        tensors = [t for t in plan.covers if plan.counted(t)]
        width = max((len(plan.covers[t]) for t in tensors), default=1)
        none = len(plan.gates)  # an extra gate with k = 1 pads the rows of tensors with fewer gates
        rows = [[c.gate for c in plan.covers[t]] for t in tensors]
        self._gates = torch.tensor([row + [none] * (width - len(row)) for row in rows]).view(-1, width)
        self._weight = torch.tensor([plan.numel(t) for t in tensors], dtype=torch.float64) / max(plan.prunable, 1)
        self.plan, self.measure = plan, measure or Measure()
        self.total = self.measure.removable(plan)
        self.free = torch.tensor([float(gate.pattern is None) for gate in plan.gates], dtype=torch.float64)
        self._num_units = torch.tensor([gate.num_units for gate in plan.gates])
        self._lowest = torch.tensor([gate.lowest for gate in plan.gates])
        self._multiple = torch.tensor([gate.multiple_of for gate in plan.gates])
        self._patterns = [(i, *gate.pattern) for i, gate in enumerate(plan.gates) if gate.pattern]

    def keep_counts(self, k: Tensor) -> list[int]:
        """ceil(k n) for every gate, up to its next multiple and within what it allows; for n:m the nearest to k."""
        counts = torch.ceil(k * self._num_units).long()
        counts = (counts + self._multiple - 1) // self._multiple * self._multiple
        keep: list[int] = counts.maximum(self._lowest).minimum(self._num_units).tolist()
        for index, _, of in self._patterns:
            keep[index] = self.plan.gates[index].num_units // of * round(k[index].item() * of)
        return keep

    def with_patterns(self, sigma: Tensor, temperature: float, level: float) -> Tensor:
        """sigma, with the thresholds of n:m gates where they keep `level`, and at least n of m."""
        sigma = sigma.clone() if self._patterns else sigma
        for index, kept, of in self._patterns:
            share = max(kept / of, level)
            sigma[index] = temperature * (math.log(share / (1.0 - share)) if share < 1.0 else START)
        return sigma

    def made(self, k: Tensor) -> Tensor:
        """k, of n:m gates as `keep_counts` makes it: whole counts of m, where k falls with the level.

        Rounded to the nearest: upwards 2:4 would keep three of four until the level is the target, and have little
        time left.
        """
        k = k.clone() if self._patterns else k
        for index, _, of in self._patterns:
            k[index] = round(k[index].item() * of) / of
        return k

    def share_gradient(self, grad: Tensor) -> Tensor:
        """dL/dsigma, (G,): tied gates have the sum of theirs, gates with a pattern none."""
        grad = grad * self.free
        for group in self.plan.tied:
            if len(group) > 1:
                grad[list(group)] = grad[list(group)].sum()
        return grad

    def shifted(self, sigma: Tensor, delta: float) -> Tensor:
        """sigma + delta for the thresholds that are free, float64."""
        return sigma.double() + delta * self.free

    def ratio(self, k: Tensor) -> Tensor:
        """R of keep ratios k, shape (G,); differentiable."""
        padded = torch.cat([k, k.new_ones(1)])
        return (self._weight * padded[self._gates].prod(1)).sum()

    def value_and_slope(self, k: Tensor, temperature: float) -> tuple[float, float]:
        """R of keep ratios k, and dR for a shift of one common to all thresholds."""
        parts = self._weight * torch.cat([k, k.new_ones(1)])[self._gates].prod(1)
        slopes = torch.cat([(1.0 - k) * self.free, k.new_zeros(1)])[self._gates].sum(1)
        return parts.sum().item(), (parts * slopes).sum().item() / temperature

    def penalty(self, sigma: Tensor, temperature: float, target: float) -> tuple[float, float, Tensor]:
        """(R, L_reg, dL_reg/dsigma), the last float64 of shape (G,); L_reg = max(R - target, 0)^2."""
        sigma = sigma.double().detach().requires_grad_()
        with torch.enable_grad():
            remaining = self.ratio(keep_ratio(sigma, temperature))
            loss = (remaining - target).clamp(min=0) ** 2
        (grad,) = torch.autograd.grad(loss, sigma)
        return remaining.item(), loss.item(), grad * self.free


def adaptive_lambda(loss: float, target: float, lambda_max: float, lambda_min: float) -> float:
    """lambda = max(lambda_max L_reg / (1 - R_target)^2, lambda_min)."""
    return max(lambda_max * loss / max(1.0 - target, 1e-12) ** 2, lambda_min)


def balanced_lambda(loss: float, grad_reg: Tensor, task_size: float, rate: float, beta1: float) -> float:
    """The adaptive lambda in units of the task's gradient: ||lambda dL_reg|| = 4 task_size min(1, left / landing).

    The published numbers suit one loss and one T: the regulariser's gradient falls with 1/T and with k(1 - k), the
    task's grows with the loss, and where the second is larger R stalls above the target. `task_size` is the task's
    root mean square over the memory of Adam's second moment, so that Adam's step is a steady share of the rate:
    measured on the step's own gradient, lambda would fall with it, and Adam, which still remembers the larger ones,
    would all but stop. "Left" are the steps to the target at full rate; landing = 4 / (1 - beta1) of them brake
    in time for Adam's first moment, so that R does not fall through the target.
    """
    if loss <= 0.0:
        return 0.0
    gap = math.sqrt(loss)
    slope = grad_reg.sum().item() / (2.0 * gap)  # dR for a step of one, common to all thresholds
    steps_left = gap / max(rate * slope, 1e-30)
    push = min(1.0, steps_left * (1.0 - beta1) / LANDING)
    return RATIO * push * task_size / max(grad_reg.norm().item(), 1e-30)


class TaskSize:
    """Root mean square of the norm of the task's threshold gradient, averaged as Adam averages its second moment."""

    def __init__(self) -> None:
        self.mean_square = 0.0

    def follow(self, grad_task: Tensor, beta2: float, step: int) -> float:
        """Take in the gradient of step `step`, counted from 1; returns the size, corrected for the start at 0."""
        self.mean_square = beta2 * self.mean_square + (1.0 - beta2) * grad_task.norm().item() ** 2
        return math.sqrt(self.mean_square / (1.0 - beta2**step))


def bisect(below: Callable[[float], bool], low: float, high: float, num_steps: int = 100) -> tuple[float, float]:
    """Narrow [low, high] around the point where `below` turns from True to False."""
    for _ in range(num_steps):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (middle, high) if below(middle) else (low, middle)
    return low, high


def shift_range(remaining: Remaining, sigma: Tensor, temperature: float) -> tuple[float, float]:
    """Shifts that take every free threshold from keep ratio 0 to keep ratio 1, for all practical purposes."""
    free = sigma[remaining.free.bool()]
    reach = SATURATED * temperature
    return (-reach - free.max().item(), reach - free.min().item()) if len(free) else (0.0, 0.0)


def level_shift(remaining: Remaining, sigma: Tensor, temperature: float, level: float) -> float:
    """The delta for which R(sigma + delta) = level (docs/how_it_works.md, projected control).

    Newton's method inside a bracket: R grows with delta, and from one step to the next it moves little.
    """
    if level >= 1.0 or not remaining.free.any():
        return 0.0
    low, high = shift_range(remaining, sigma, temperature)
    delta = 0.0
    for _ in range(100):
        value, slope = remaining.value_and_slope(keep_ratio(remaining.shifted(sigma, delta), temperature), temperature)
        low, high = (delta, high) if value < level else (low, delta)
        goal = delta + (level - value) / max(slope, 1e-300)
        goal = goal if low < goal < high else 0.5 * (low + high)
        if abs(goal - delta) <= 1e-9 * temperature:
            break
        delta = goal
    return delta


def calibrate(density: float, remaining: float) -> float:
    """density / R, the correction for what R does not know of hybrids and edge blocks."""
    lowest, highest = CALIBRATIONS
    return min(max(density / remaining, lowest), highest)


def project_level(
    remaining: Remaining, sigma: Tensor, temperature: float, level: float, calibration: float, count: CountWeights
) -> tuple[Tensor, float]:
    """Shift all thresholds so that the real masks keep `level` of the prunable weights.

    R is a model of the density, exact for one gate a tensor with equal units; hybrids and edge blocks need a
    correction, density = calibration * R, which moves little from step to step. It is measured on real masks
    (`count`: kept counts -> kept weights) and refined until the density agrees to a thousandth of the level. What an
    n:m gate keeps too much or too little until it comes to its next count is not made up for by the others: they would
    come down and go up again.

    Returns the shifted sigma, in sigma's dtype, and the calibration to start from at the next step.
    """
    for _ in range(4):
        delta = level_shift(remaining, sigma, temperature, min(level / calibration, 1.0 - 1e-9))
        shifted = remaining.shifted(sigma, delta).to(sigma.dtype)
        ratio = keep_ratio(shifted, temperature)
        density = count(remaining.keep_counts(ratio)) / remaining.total
        made = remaining.ratio(remaining.made(ratio)).item()
        if abs(density - level * made / remaining.ratio(ratio).item()) <= 1e-3 * level:
            break
        calibration = calibrate(density, made)
    return shifted, calibration


def project_exact(
    remaining: Remaining, sigma: Tensor, temperature: float, target: float, count: CountWeights
) -> tuple[Tensor, list[int]]:
    """The settle projection: one shift for all thresholds, then single units, to the smallest density >= target.

    The density of real masks grows in steps with the shift; at the step that crosses the target several gates
    may gain a unit at once, and they are taken in order until the target is reached. What a large unit (a head) then
    leaves above the target is taken back in the smallest units there are (neurons).

    Returns sigma after the shift and the kept count of every gate.
    """
    goal = math.ceil(target * remaining.total - 1e-6)
    groups = remaining.plan.tied

    def counts(delta: float) -> list[int]:
        return remaining.keep_counts(keep_ratio(remaining.shifted(sigma, delta), temperature))

    def is_enough(keep: list[int]) -> bool:
        return count(keep) >= goal

    low, high = shift_range(remaining, sigma, temperature)
    low, high = bisect(lambda delta: not is_enough(counts(delta)), low, high)
    few, many = counts(low), counts(high)

    def mixed(num: int) -> list[int]:
        keep = list(few)
        for index in (index for group in groups[:num] for index in group):
            keep[index] = many[index]
        return keep

    first, last = 0, len(groups)  # groups[:first] at `many` is too little, groups[:last] is enough
    while last - first > 1:
        middle = (first + last) // 2
        first, last = (first, middle) if is_enough(mixed(middle)) else (middle, last)
    keep = take_back(remaining, mixed(last), goal, count)
    return remaining.shifted(sigma, high).to(sigma.dtype), keep


def take_back(remaining: Remaining, keep: list[int], goal: float, count: CountWeights) -> list[int]:
    """Kept counts with as many units less as `goal`, in what the measure counts, allows: of the finest gates first.

    By arithmetic where the amount is a sum over gates; else the number of units is searched for.
    """
    plan, measure = remaining.plan, remaining.measure
    rooms: dict[float, list[tuple[int, tuple[int, ...]]]] = {}  # by what a unit counts: how many may go, of which gates
    for group in plan.tied:
        gate, kept = plan.gates[group[0]], keep[group[0]]
        room, odd = divmod(kept - gate.lowest, gate.multiple_of)
        if gate.pattern is None and room > 0 and not odd and (grain := measure.grain(plan, group)) > 0:
            rooms.setdefault(grain, []).append((room, group))
    excess = count(keep) - goal
    for grain, own in sorted(rooms.items()):
        total = sum(room for room, _ in own)
        if measure.linear(plan):
            steps = min(max(int(excess // grain), 0), total)
            keep, excess = _fewer(plan, keep, own, steps), excess - steps * grain
        elif excess > 0:
            enough, too_many = 0, total + 1
            while too_many - enough > 1:
                middle = (enough + too_many) // 2
                fits = count(_fewer(plan, keep, own, middle)) >= goal
                enough, too_many = (middle, too_many) if fits else (enough, middle)
            keep = _fewer(plan, keep, own, enough)
            excess = count(keep) - goal
    return keep


def _fewer(plan: GatePlan, keep: list[int], rooms: Sequence[tuple[int, Sequence[int]]], steps: int) -> list[int]:
    """Kept counts with `steps` units less: after every group the share of them that its room stands for (Bresenham)."""
    left, before, total = list(keep), 0, sum(room for room, _ in rooms)
    for room, group in rooms:
        taken = (before + room) * steps // total - before * steps // total
        before += room
        for index in group:
            left[index] -= taken * plan.gates[index].multiple_of
    return left
