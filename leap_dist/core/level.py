"""The level: how much is kept in all, step by step, and exactly the target in the end."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from leap_dist.config.leap import LeapConfig
from leap_dist.core import thresholds as th
from leap_dist.core.closed_form import closed_form
from leap_dist.core.counting import SLACK
from leap_dist.core.fixed import Fixed, check_order, put_masks_
from leap_dist.core.gates import GatePlan
from leap_dist.core.gating import Gating
from leap_dist.core.importance import Norms, write_importance_
from leap_dist.core.inputs import Inputs
from leap_dist.core.masks import Masks
from leap_dist.core.measure import SAID, Measure, check_reachable, fewest_units, most_units
from leap_dist.core.phases import Schedule
from leap_dist.core.signal import Signal
from leap_dist.core.soft import Soft
from leap_dist.errors import UserError
from leap_dist.ops.reference import Adam

NEAR = 1e-3  # a density that is off by less, to the target, needs no words


class Level:
    """Holds the density of the masks at the scheduled level: by the regulariser ("paper") or by a shift of all
    thresholds ("projected"); `settle` makes it the target and freezes the masks. `bind` comes first.

    kept_units: of every gate; kept_weights: prunable ones that the masks in place keep; lowest: what the fewest
    units that every gate keeps come to, by the scores at the start, as the measure counts; calibration: density / R, as
    last measured; regulariser: lambda and L_reg of the last step, empty where there is none; started: whether scores
    have their start, which with norms of inputs comes with the first masks.
    """

    def __init__(
        self,
        plan: GatePlan,
        config: LeapConfig,
        schedule: Schedule,
        fixed: Fixed | None = None,
        measure: Measure | None = None,
        prior: Fixed | None = None,
    ) -> None:
        """config.target and schedule: the share of what gates cover that stays, as the measure counts."""
        self._prior = prior
        self.plan, self.config, self.schedule, self.fixed = plan, config, schedule, fixed
        self.measure = measure or Measure(target=config.target)
        self._asked = config.target
        self.remaining = th.Remaining(plan, self.measure)
        self.settled = self.started = False
        self.calibration = 1.0
        self.kept_units = [gate.num_units for gate in plan.gates]
        self.kept_weights = plan.prunable
        self.lowest: float = plan.prunable
        self.regulariser: dict[str, float] = {}
        self.task_size = th.TaskSize()
        self.signal = Signal(plan)
        self._made: list[int] | None = None  # kept counts of the masks that are in place
        self.soft: Soft | None = None  # of rule "gumbel", once bound
        self._given: dict[int, Tensor] = {}  # of `start_units`
        self._counted: dict[tuple[bool, tuple[int, ...]], int] = {}  # by kept counts, until scores move
        self._form = closed_form(plan)
        self._form_measured = closed_form(plan, followers=True) if self.measure.name == "parameters" else self._form

    def bind(self, gating: Gating, masks: Masks, inputs: Inputs | None = None, seed: int = 0) -> None:
        """Start the thresholds, and the scores where they start from the weights alone.

        inputs: where scores wait for what the weights are multiplied with. Raises UserError if the target is below
        what one unit in every gate keeps.
        """
        self._gating, self._masks, self._inputs = gating, masks, inputs
        self.started = False
        self.soft = Soft(gating, self.config, self.schedule, seed) if self.config.rule == "gumbel" else None
        if not self.plan.gates:
            return
        for given in filter(None, (self.fixed, self._prior)):
            check_order(gating, given)
        if self.fixed is not None:
            self._fix(self.fixed)
            return
        gating.write_thresholds(torch.full((len(self.plan.gates),), th.START * self.config.temperature))
        if inputs is None and self.config.mode == "train":
            self._start()
        self._check_reachable()

    def _fix(self, fixed: Fixed) -> None:
        """Settle with masks that are there; the target is what they keep. Collective.

        Raises UserError where that is not what was asked for, or nothing is pruned, or everything.
        """
        self.kept_units = self._made = put_masks_(self._gating, fixed)
        counted = [gate.num_weights > 0 for gate in self.plan.gates]
        kept = sum(n for n, counts in zip(self.kept_units, counted, strict=True) if counts)
        start, prunable, target = self.config.start, self.plan.prunable, self._asked
        if kept in (0, prunable):
            what = "no weight" if kept == prunable else "every weight"
            raise UserError(
                f'leap.start: got "{start}", by which {what} of the {prunable} prunable ones is zero; allowed: masks '
                "that keep a part"
            )
        if target and abs(target * prunable - kept) > 1.0 + SLACK:
            raise UserError(
                f'leap.target: got {target}, but the masks of leap.start "{start}" keep {kept} of {prunable} weights, '
                f"{kept / prunable:.6f}; leave it out"
            )
        density = target or kept / prunable
        self.measure = Measure(target=density)
        self.config = self.config.model_copy(update={"target": density})
        self.schedule = replace(self.schedule, target=density)
        self.kept_weights = self.lowest = kept
        shares = [n / gate.num_units for n, gate in zip(self.kept_units, self.plan.gates, strict=True)]
        k = torch.tensor(shares, dtype=torch.float64).clamp(1e-6, 1.0 - 1e-6)
        self._gating.write_thresholds((torch.logit(k) * self.config.temperature).float())
        self.settled = self.started = True
        self._masks.note_flips()

    def gather(self) -> None:
        """Until scores start: sum what this step's forward passes have shown over the ranks. Collective."""
        if not self.started and self._inputs is not None:
            self._inputs.pool()

    def start_units(self, given: Mapping[int, Tensor]) -> None:
        """Start the scores of structured gates from these, (units,) by number of the gate, and only the others' from
        the weights. Before the first step. Collective."""
        self._given = dict(given)
        if self.started:
            self.started = False
            self._start()
            self._scores_moved()

    def _start(self) -> None:
        """Give the scores their start, once. Collective.

        Where that waits for inputs it is added to what the scores have moved: as long as nothing is masked no gradient
        depends on them, so it is as if they had started there. In one shot, where only their order counts, |W| is not
        divided by its mean.
        """
        config, norms = self.config, None
        if self.started:
            return
        if self._inputs is not None:
            self._inputs.pool()
            values, by_gradient = self._inputs.norms(), config.score_init == "gradient"
            norms = Norms(values, self._inputs.axes, by_gradient)
            self._inputs.listen(False)
        if config.score_init != "zero" or config.rule == "magnitude":
            scaled, added = config.mode == "train", norms is not None
            write_importance_(self._gating, norms, scaled=scaled, added=added, given=self._given)
        self.started = True

    def _start_soft(self, soft: Soft) -> None:
        """Scores of rule "gumbel" from the masks that are given, or that those at the start make. Collective."""
        if self._prior is not None:
            put_masks_(self._gating, self._prior)
        else:
            self._masks.make(self.remaining.keep_counts(soft.first_shares()))
        soft.start_()
        self._masks.make([gate.num_units for gate in self.plan.gates])
        self._scores_moved()

    def _check_reachable(self) -> None:
        """Raise UserError if the target is below or above what the gates allow."""
        lowest = self.lowest = self._amount(fewest_units(self.plan))
        highest = self._amount(most_units(self.plan))
        self._masks.make(self.kept_units)
        self._scores_moved()
        check_reachable(self.plan, self.measure, lowest, highest)

    @property
    def density(self) -> float:
        """Kept prunable weights / prunable weights, of the masks in place; of soft ones their mean."""
        if soft := self.soft_in_place:
            return soft.mean
        return self.kept_weights / max(self.plan.prunable, 1)

    @property
    def soft_in_place(self) -> Soft | None:
        """The soft masks, while the hosted weights are W times these."""
        return self.soft if self.soft is not None and self.soft.on else None

    def measures(self, step: int) -> dict[str, float]:
        """To log after a step: the density, the scheduled level, R and the keep ratios over gates. Collective."""
        sigma = self._gating.gather_thresholds()
        k = th.keep_ratio(sigma, self.config.temperature) if len(sigma) else torch.ones(1)
        return {
            "density": self.density,
            "level": self.schedule.level(step),
            "keep_ratio_min": k.min().item(),
            "keep_ratio_max": k.max().item(),
            "keep_ratio_std": k.std(unbiased=False).item(),
            "remaining": self.remaining.ratio(k).item() if len(sigma) else 1.0,
            "thresholds_held": float(self.signal.held.sum()),
        }

    def note(self, kept: float | None = None) -> str | None:
        """Why the masks in place keep another part than the target, in words; None where they keep it (to 0.1 %).

        kept: what the measure counts of the masks (core/measure.py, `amounts`); None: their prunable weights.
        """
        plan, measure = self.plan, self.measure
        kept = self.kept_weights if kept is None else kept
        total = max(measure.fixed + self.remaining.total, 1)
        asked = measure.target * total
        slack = max(1.0, NEAR * asked)
        if abs(kept - asked) <= slack:
            return None
        what = SAID[measure.name]
        said = f"the {what} is {kept / total:.4f}, the target {measure.target}: "
        if kept > asked and measure.fixed + self.lowest > asked + slack:
            limits = [f"min_keep {gate.min_keep}" for gate in plan.gates if gate.min_keep > 1]
            limits += [f"multiple_of {gate.multiple_of}" for gate in plan.gates if gate.multiple_of > 1]
            why = ", ".join(dict.fromkeys(limits)) or "one unit in every gate"
            lowest = f"{(measure.fixed + self.lowest) / total:.4f}"
            return f"{said}no {what} below {lowest} is possible, because {why} stays; finer gates can go lower"
        largest = max(plan.tied, key=plan.grain)
        gate = plan.gates[largest[0]]
        together = f", {gate.multiple_of} at a time (multiple_of)" if gate.multiple_of > 1 else ""
        together += f", in {len(largest)} gates at once (uniform)" if len(largest) > 1 else ""
        others = {other.granularity: other.unit_size for other in plan.gates if other.granularity != gate.granularity}
        units = (
            f"a unit of {gate.granularity} has {gate.unit_size} of the {plan.prunable} weights"
            + "".join(f", one of {name} {size}" for name, size in others.items())
            + " and is kept or removed whole"
        )
        return f"{said}{units}{together}; finer gates come nearer"

    def regulariser_gradient(self, task: Tensor, adam: Adam) -> Tensor:
        """lambda dL_reg/dsigma, (G,), for the task's gradient `task`; lambda is adaptive and detached."""
        config, sigma = self.config, self._gating.gather_thresholds()
        _, loss, grad = self.remaining.penalty(sigma, config.temperature, config.target / self.calibration)
        if config.lambda_max == "auto":
            size = self.task_size.follow(task, adam.beta2, int(adam.step))
            scale = th.balanced_lambda(loss, grad, size, adam.lr, adam.beta1)
        else:
            scale = th.adaptive_lambda(loss, config.target, config.lambda_max, config.lambda_min)
        self.regulariser = {"lambda": scale, "loss_reg": loss}
        return scale * grad

    def hold(self, step: int) -> None:
        """Thresholds and masks of the forward pass of a step; settles where that is in the settle phase."""
        self._start()
        if self.soft is not None and self.schedule.phase(step) != "settle":
            self._hold_soft(self.soft, step)
            return
        if self.config.rule == "magnitude":
            write_importance_(self._gating, scaled=False)
        if self.schedule.phase(step) == "settle":
            self.settle()
            return
        self._scores_moved()
        level, temperature = self.schedule.level(step), self.config.temperature
        sigma = self.remaining.with_patterns(self._thresholds(), temperature, level)
        if self.config.control == "projected" or self.config.rule != "leap":
            sigma, self.calibration = th.project_level(
                self.remaining, sigma, temperature, level, self.calibration, self._amount
            )
        self._gating.write_thresholds(sigma)
        k = th.keep_ratio(sigma, temperature)
        self._use(self.remaining.keep_counts(k))
        if self.config.control == "paper" and not (self.plan.linear and self.measure.name == "weights"):
            share = self._amount(self.kept_units) / self.remaining.total
            self.calibration = th.calibrate(share, self.remaining.ratio(self.remaining.made(k)).item())

    def _hold_soft(self, soft: Soft, step: int) -> None:
        if not soft.on:
            self._start_soft(soft)
        soft.hold_(step, self.schedule.level(step))
        self.regulariser = soft.regulariser

    def settle(self) -> None:
        """Make the density exact and freeze the masks."""
        self._start()
        if self.soft is not None:
            self._gating.write_thresholds(self.soft.thresholds(self.config.temperature, self.config.target))
            self.soft.on = False
        self._scores_moved()
        if self.plan.gates:
            temperature, target = self.config.temperature, self.config.target
            sigma = self.remaining.with_patterns(self._thresholds(), temperature, level=0.0)
            sigma, keep = th.project_exact(self.remaining, sigma, temperature, target, self._amount)
            self._gating.write_thresholds(sigma)
            self._use(keep)
        self.settled, self.regulariser = True, {}

    def _thresholds(self) -> Tensor:
        sigma = self._gating.gather_thresholds()
        if not torch.isfinite(sigma).all():
            pairs = zip(self.plan.gates, sigma.tolist(), strict=True)
            names = [gate.name for gate, value in pairs if not math.isfinite(value)]
            raise FloatingPointError(f"the thresholds of {', '.join(names)} are NaN or infinite")
        return sigma

    def _count(self, keep: list[int]) -> int:
        """Weights kept by kept counts: by arithmetic where that is exact, else counted on real masks."""
        return self._form(keep) if self._form else self._count_masks(keep)

    def _count_masks(self, keep: list[int], followers: bool = False) -> int:
        """What the masks of these kept counts keep; counted once, because every count takes a selection."""
        key = followers, tuple(keep)
        if key not in self._counted:
            self._make(keep)
            self._counted[key] = self._masks.count_kept(followers)
        return self._counted[key]

    def _scores_moved(self) -> None:
        """What is known of the masks of earlier scores holds no longer."""
        self._made, self._counted = None, {}

    def _amount(self, keep: list[int]) -> float:
        """What the measure counts of these kept counts: by arithmetic where that is exact, else on real masks."""
        measure = self.measure
        if measure.name == "weights":
            return self._count(keep)
        if self._form_measured:
            return self._form_measured(keep) + measure.of_products(keep)
        return self._count_masks(keep, followers=measure.name == "parameters") + measure.of_products(keep)

    def _make(self, keep: list[int]) -> None:
        if keep != self._made:
            self._masks.make(keep)
            self._made = list(keep)

    def _use(self, keep: list[int]) -> None:
        """Put the masks of these kept counts in place."""
        self._make(keep)
        self.kept_units = list(keep)
        self.kept_weights = self._count(keep)

    # Checkpoints

    def plain_state(self) -> dict[str, Any]:
        """What a checkpoint has to hold of the level, JSON-able."""
        return {
            "settled": self.settled,
            "started": self.started,
            "given": {} if self.started else {str(gate): own.tolist() for gate, own in self._given.items()},
            "calibration": self.calibration,
            "kept_units": self.kept_units,
            "kept_weights": self.kept_weights,
            "masked": self._made is not None,
            "regulariser": self.regulariser,
            "task_size": self.task_size.mean_square,
            "signal": self.signal.plain_state(),
            "soft": self.soft.plain_state() if self.soft else {},
        }

    def load_plain_state(self, saved: Mapping[str, Any]) -> None:
        """Continue from `plain_state()`, after the scores were put in place: the masks follow from them. Collective."""
        self.take_plain_state(saved)
        if self._made is not None and self.fixed is None:
            self._masks.make(self._made)
            self._masks.note_flips()
        elif self._made is None:
            self._gating.unit_mask.fill_(True)

    def take_plain_state(self, saved: Mapping[str, Any]) -> None:
        """Continue from `plain_state()`, after scores and masks were put in place. Local."""
        self.settled, self.calibration = saved["settled"], saved["calibration"]
        self.started = saved.get("started", True)  # as all were that an older version has saved
        given = saved.get("given", {})
        self._given = {int(gate): torch.tensor(values, dtype=torch.float64) for gate, values in given.items()}
        if self._inputs is not None:
            self._inputs.listen(not self.started)
        self.regulariser, self.task_size.mean_square = dict(saved["regulariser"]), saved["task_size"]
        self.signal.load_plain_state(saved.get("signal", {}))
        self.kept_units, self.kept_weights = list(saved["kept_units"]), saved["kept_weights"]
        self._scores_moved()
        self._made = list(self.kept_units) if saved["masked"] else None
        if self.soft is not None:
            self.soft.load_plain_state(saved["soft"])
        self._masks.forget()
        self._masks.note_flips()  # the next report counts from here
