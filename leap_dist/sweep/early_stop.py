"""Stopping trials that are clearly behind, by Ray Tune's ASHA (arXiv 1810.05934) or its median rule.

Trials are compared at rungs, by the metric of the model as it is pruned then, and with those of the same target, task
and validation data alone: a smaller model is no worse for being smaller. What was decided stands, also when a sweep was
cut off.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from leap_dist.sweep.line import Line
from leap_dist.sweep.result import Group, judged_on
from leap_dist.sweep.trainable import METRICS, RUNG
from leap_dist.tracking.pareto import higher_is_better

LAST = 16  # above every rung: train/watch.py has 1, 2, 4 and 8
REDUCTION = 2  # one of so many continues at each rung
WORST = -1e300  # of a metric that is no number
NEVER: Any = math.inf  # steps after which the median rule would pause a trial for others


@dataclass(frozen=True)
class Competitor:
    """A trial as Tune's schedulers know it."""

    trial_id: str


class Judge(FIFOScheduler):
    """Tune's scheduler, one for each target and what is judged on the same data; it begins with what earlier calls of
    the sweep have decided."""

    def __init__(self, line: Line) -> None:
        super().__init__()
        self._line, self._sign = line, 1.0 if higher_is_better(line.metric) else -1.0
        self._rules: dict[tuple[float, Group], Any] = {}
        self._verdicts: dict[tuple[str, int], bool] = {}
        groups = {trial.name: judged_on(trial.config) for trial in line.trials}
        for judged in line.judged:
            peers = judged["target"], groups.get(judged["trial"], ("", ""))
            self._ask(judged["trial"], peers, judged["rung"], judged["metrics"])
            self._verdicts[judged["trial"], judged["rung"]] = judged["goes_on"]

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if METRICS not in result:
            return str(TrialScheduler.CONTINUE)
        name, rung, metrics = trial.config["name"], result[RUNG], json.loads(result[METRICS])
        if (name, rung) not in self._verdicts:
            config = trial.config["work"].config
            target = config.leap.target
            goes_on = self._verdicts[name, rung] = self._ask(name, (target, judged_on(config)), rung, metrics)
            self._line.judge(name, {"rung": rung, "target": target, "metrics": metrics, "goes_on": goes_on})
        return str(TrialScheduler.CONTINUE if self._verdicts[name, rung] else TrialScheduler.STOP)

    def _ask(self, name: str, peers: tuple[float, Group], rung: int, metrics: Mapping[str, float]) -> bool:
        """Whether Tune lets a trial continue. peers: the target and the data of those that it is compared with.

        One without the metric does: its end says so.
        """
        if self._line.metric not in metrics:
            return True
        if peers not in self._rules:
            common: dict[str, Any] = {"time_attr": RUNG, "metric": "worth", "mode": "max", "grace_period": 1}
            self._rules[peers] = (
                ASHAScheduler(**common, max_t=LAST, reduction_factor=REDUCTION)
                if self._line.sweep.early_stop == "asha"
                else MedianStoppingRule(**common, min_samples_required=2, min_time_slice=NEVER)
            )
        rule, competitor = self._rules[peers], Competitor(name)
        if all(name != seen for seen, _ in self._verdicts):
            rule.on_trial_add(None, competitor)
        value = float(metrics[self._line.metric])
        worth = WORST if math.isnan(value) else self._sign * value
        return bool(rule.on_trial_result(None, competitor, {RUNG: rung, "worth": worth}) != TrialScheduler.STOP)
