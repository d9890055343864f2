"""The Adam of every kind of value that a step moves: weights, scores and thresholds, each at its learning rate."""

from collections.abc import Mapping
from typing import Any

from leap_dist.config.leap import LeapConfig
from leap_dist.core.gates import GatePlan
from leap_dist.core.phases import Schedule
from leap_dist.ops.reference import Adam

SOFT_BETA2 = 0.95  # of the scores of rule "gumbel", as published


class Rates:
    """`group` is always a parameter group of LeapAdamW; `update` counts its updates from 1, `pruning` those since the
    prune phase began."""

    def __init__(self, plan: GatePlan, config: LeapConfig, schedule: Schedule) -> None:
        self._plan, self._config, self._schedule = plan, config, schedule

    def weights(self, group: Mapping[str, Any], update: int) -> Adam:
        """At the group's rate, with its weight decay."""
        return _adam(group, update, group["lr"], group["weight_decay"])

    def scores(self, group: Mapping[str, Any], update: int, pruning: int, elementwise: bool) -> Adam:
        """A scheduler scales their rate with the group's; where that starts at 0, scores keep theirs."""
        peak = group.get("max_lr", group["base_lr"])
        scale = group["lr"] / peak if peak > 0.0 else 1.0
        adam = _adam(group, update, self._config.score_rate(elementwise, self._schedule.trust) * scale)
        if self._config.rule == "gumbel":  # they move from the update after the first of the prune phase on
            return adam._replace(beta2=SOFT_BETA2, step=pruning - 1)
        return adam

    def thresholds(self, group: Mapping[str, Any], pruning: int) -> Adam:
        """Their moments start with the prune phase."""
        return _adam(group, pruning, self.threshold_rate)

    @property
    def threshold_rate(self) -> float:
        """As configured, or from the distance to the target and the phase's length."""
        rate, projected = self._config.threshold_learning_rate, self._config.control == "projected"
        elementwise = not self._plan.structured
        auto = self._schedule.threshold_rate(self._config.temperature, projected, elementwise)
        return auto if rate == "auto" else rate


def _adam(group: Mapping[str, Any], step: int, rate: float, weight_decay: float = 0.0) -> Adam:
    beta1, beta2 = group["betas"]
    return Adam(lr=rate, beta1=beta1, beta2=beta2, eps=group["eps"], weight_decay=weight_decay, step=step)
