"""The three phases of a run, dense -> prune -> settle, and the rates that follow from their lengths."""

import math
from dataclasses import dataclass
from typing import Literal

from leap_dist.config.leap import LeapConfig
from leap_dist.core.gates import GatePlan
from leap_dist.core.thresholds import START

Phase = Literal["dense", "prune", "settle"]
DESCENT = 0.85  # part of the prune phase in which the level comes down to the target
EVEN = 0.25  # density from which on the thresholds of single weights move apart more slowly
ENOUGH = 0.02  # tokens a prunable weight, of the whole run, from which on the automatic rates are whole
ENOUGH_UNITS = 0.15  # the same where units of many weights have scores: these lie closer together


@dataclass(frozen=True)
class Schedule:
    """Steps are optimizer steps, counted from 0; level(t) is the density of the masks in step t's forward pass.

    The first step of the prune phase still runs dense: its end makes the first masks.
    """

    total_steps: int
    dense_fraction: float
    settle_fraction: float
    target: float
    trust: float = 1.0  # of `budget`

    @property
    def dense_end(self) -> int:
        """First step of the prune phase: at least one step is dense, unless the fraction is 0."""
        steps = self.total_steps * self.dense_fraction
        return max(1, round(steps)) if steps else 0

    @property
    def settle_start(self) -> int:
        """First step of the settle phase."""
        return max(self.total_steps - max(1, round(self.total_steps * self.settle_fraction)), self.dense_end + 1)

    def phase(self, step: int) -> Phase:
        """The phase of a step."""
        if step < self.dense_end:
            return "dense"
        return "prune" if step < self.settle_start else "settle"

    def level(self, step: int) -> float:
        """The scheduled density: 1 in the dense phase, a cubic descent, the target at 85 % of the prune phase.

        The cubic form is that of Zhu and Gupta, arXiv 1710.01878. A run that has little to learn from comes down
        sooner, and has longer to recover.
        """
        length = max(DESCENT * self.trust * (self.settle_start - self.dense_end), 1.0)
        progress = min(max((step + 1 - self.dense_end) / length, 0.0), 1.0)
        return self.target + (1.0 - self.target) * (1.0 - progress) ** 3

    def threshold_rate(self, temperature: float, projected: bool, elementwise: bool) -> float:
        """The automatic learning rate of thresholds: with Adam a threshold moves about its rate per step.

        From k = 0.9933 to k = target it travels (5 - logit(target)) T. Where the regulariser drives it, the rate lets
        it do so in half the prune phase, whatever the phase's length. Where a projection holds the level, thresholds
        only move apart, and travel through the whole phase. Where most of the single weights are kept, equal shares are
        nearly right, and moving apart costs more than it finds. Measured in docs/benchmarks.md. `elementwise`: all
        gates are of single weights.
        """
        target = min(self.target, 1.0 - 1e-6)
        travel = (START - math.log(target / (1.0 - target))) * temperature
        steps = (self.settle_start - self.dense_end) / (1.0 if projected else 2.0)
        share = min(EVEN / target, 1.0) ** 2 if projected and elementwise else 1.0
        return self.trust * share * max(travel, temperature) / max(steps, 1.0)


def budget(config: LeapConfig, plan: GatePlan) -> float:
    """How much of the automatic rates and of the descent a run has use for: 0 < trust <= 1.

    Scores that start by inputs order a language model's weights well; what few tokens say beside it is noise, and
    the masks had better stay as they start. So the rates of scores and thresholds, and the length of the descent, are
    proportional to the tokens of the whole run a prunable weight, up to 1. Of heads and neurons weights are counted
    too, as these have to recover from what masks do; and a step of the same size moves more of them over the cut, as
    means over many weights lie closer together. Under rules of hand-made schedules, with other starts, where weights
    are frozen and masks are all that can learn, and where the tokens are not known, it is 1. Measured in
    docs/benchmarks.md.
    """
    tokens = config.tokens_per_step
    if not config.budgeted or not isinstance(tokens, int):
        return 1.0
    enough = ENOUGH_UNITS if plan.structured else ENOUGH
    return min(1.0, tokens * (config.total_steps or 0) / max(plan.prunable, 1) / enough)


def schedule_of(config: LeapConfig, plan: GatePlan, *, fixed: bool = False) -> Schedule:
    """The phases of a run; with fixed masks it settles from the first step, with frozen weights at the last."""
    fractions = (0.0, 1.0) if fixed else (config.dense_fraction, 0.0 if config.frozen else config.settle_fraction)
    return Schedule(config.total_steps or 0, *fractions, config.target, budget(config, plan))
