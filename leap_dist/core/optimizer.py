"""LeapAdamW: from the gradient of the masked weights to new latent weights, scores, thresholds and masks.

The hosted weights are W * M; their gradient G = dL/d(W * M) arrives reduced over the ranks, clipped and sharded. One
step over the fragments that this rank holds of the gated parameter group:

1. update   dL/dS of every unit, dL/dsigma of every threshold; Adam on element scores; AdamW on the latent W with
            G * M. One pass over the state, one all-reduce.
2. gates    Adam on this rank's fragments of structured scores and thresholds. Local.
3. level    thresholds are gathered (one all-reduce); the level is held by the regulariser ("paper") or by a shift
            common to all thresholds ("projected").
4. masks    exact top-k over shards; a few all-reduces of counts (core/select.py).
5. write    the hosted partition becomes W * M. Local.

Latent weights, element scores, masks and moments have the flat partition's shape; thresholds and structured scores
are the optimizer's own, sharded like them (core/gate_values.py). Fragments may be empty, uneven and cut anywhere.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from leap_dist.core.gating import EXP_AVG, EXP_AVG_SQ
from leap_dist.core.hosted import GATED, HostedOptimizer
from leap_dist.core.phases import Phase
from leap_dist.core.update import learn_, move_, update_, write_
from leap_dist.errors import UserError
from leap_dist.ops import dispatch as ops
from leap_dist.ops.reference import Adam


class LeapAdamW(HostedOptimizer):
    """AdamW that prunes as it steps; its arguments are those of `HostedOptimizer`.

    A scheduler may change a group's "lr", which scales the score's rate with it: their ratio is to "base_lr", the rate
    that the group started with, or to "max_lr" where a scheduler has set that.
    """

    overflow = False  # whether the last step was left out, as engines ask before they move their scheduler
    _communicated = 0, 0  # collectives and bytes of the last step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no closure
        """One optimizer step for the groups that hold parameters now (ZeRO calls once a group)."""
        assert closure is None, "LeapAdamW takes no closure"
        if self.config.mode == "one_shot":
            raise UserError(
                'leap.mode: got "one_shot", which takes no step: call leap_dist.finalize in place of the loop, or '
                "remove it to train"
            )
        if not self._started:
            self._take_over()
        for flat in (flat for group in self.param_groups for flat in group["params"]):
            self._loaded.check(flat, soft=self.level.soft_in_place is not None)
        self.overflow = False
        if self.check_gradient and not self._gradient_is_finite():
            self.skip()
            return
        for group in self.param_groups:
            if group["params"] and group[GATED]:
                self._step_gated(group)
            elif group["params"] and not self.config.frozen:
                self._step_plain(group)

    def _take_over(self) -> None:
        """Before the first step: weights that were loaded since `bind` are the start, as if they had been there."""
        if self._loaded.take_over():
            self._bind_level()
        self._started = True

    def _gradient_is_finite(self) -> bool:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        return bool(torch.isfinite(torch.nn.utils.get_total_norm(grads)))

    def skip(self) -> None:
        """A step whose update is left out, on every rank, because its gradient is not finite; the schedule moves."""
        self.num_left_out += 1
        self.num_left_out_dense += self.num_steps < self.schedule.dense_end
        self.num_steps += 1
        self.overflow = True
        self.level.gather()

    def _step_plain(self, group: dict[str, Any]) -> None:
        for param in group["params"]:
            if param.grad is None:
                continue
            state = self.state[param]
            state["step"] = state.get("step", 0) + 1
            adam = self.rates.weights(group, state["step"])
            weight, grad = param.detach().view(-1), param.grad.reshape(-1)
            ops.adamw_(weight, grad, state[EXP_AVG].view(-1), state[EXP_AVG_SQ].view(-1), adam)

    def _step_gated(self, group: dict[str, Any]) -> None:
        communicator = self.communicator
        communicator.stopwatch.restart()
        before, phase = (communicator.num_collectives, communicator.num_bytes), self.phase
        with communicator.stopwatch.measure("update"):
            self._update(group, phase)
        self.num_steps += 1
        if phase != "dense" and not self.settled:
            with communicator.stopwatch.measure("select"):
                self.level.hold(self.num_steps)
        self.level.gather()
        if self.level.soft_in_place:  # which has written
            self._loaded.remember()
        else:
            write_(self.gating)
        self._communicated = communicator.num_collectives - before[0], communicator.num_bytes - before[1]

    def _update(self, group: dict[str, Any], phase: Phase) -> None:
        """Phases 1 and 2 of the step."""
        adam = None if self.config.frozen else self.rates.weights(group, self.next_update)
        if soft := self.level.soft_in_place:
            soft.learn_(adam, *(self._of_scores(group, elementwise) for elementwise in (True, False)))
        elif self.config.rule in ("magnitude", "gumbel") or self.settled:
            update_(self.gating, adam)
        else:
            sigma_grad, unit_grad = learn_(self.gating, adam, self._of_scores(group, elementwise=True))
            if self.config.rule == "leap" and not self.level.signal.is_known:
                self.level.signal.watch(self.gating, sigma_grad)
            self._update_gates(group, phase, sigma_grad, unit_grad)

    def _of_scores(self, group: dict[str, Any], elementwise: bool) -> Adam:
        return self.rates.scores(group, self.next_update, self.next_pruning_update, elementwise)

    def _update_gates(self, group: dict[str, Any], phase: Phase, sigma_grad: Tensor, unit_grad: Tensor) -> None:
        """Phase 2 of the step: this rank's structured scores and thresholds."""
        move_(self.gating, self.gating.own_scores, unit_grad, self._of_scores(group, elementwise=False))
        if phase != "prune" or self.config.rule != "leap":
            return
        adam, heard = self.rates.thresholds(group, self.next_pruning_update), self.level.signal.heard(sigma_grad)
        if self.config.control == "paper":  # whose weight has its size also where all thresholds are held
            heard = heard + self.level.regulariser_gradient(sigma_grad, adam)
        sigma_grad = self.level.remaining.share_gradient(heard)
        move_(self.gating, self.gating.own_thresholds, sigma_grad, adam)

    @torch.no_grad()
    def settle(self) -> None:
        """Make the density exact and freeze the masks, now; does nothing where that is done.

        Raises UserError where scores are to start from gradients and no step has shown any.
        """
        if not self.settled:
            if not self.level.started and self.num_steps == 0 and self.config.score_init == "gradient":
                raise UserError(
                    "leap.score_init: scores start from gradients, and there was no step; allowed before the first "
                    'one: "activation" or "magnitude", or leap.mode "one_shot"'
                )
            if not self._started:
                self._take_over()
            self.level.settle()
            write_(self.gating)

    @torch.no_grad()
    def measures(self) -> dict[str, float]:
        """What to log of this step: density, scheduled level, R, keep ratios over gates, lambda; and its cost here.

        mask_flips: prunable weights whose mask is another than at the last report. The cost is this rank's, of the
        gated step: milliseconds by part (TIMINGS), collectives and the bytes handed to them, bytes of state beyond
        dense AdamW's. Collective: every rank calls it.
        """
        collectives, sent = self._communicated
        cost = {**self.communicator.stopwatch.milliseconds(), "leap_collectives": float(collectives)}
        cost |= {"leap_bytes_communicated": float(sent), "leap_extra_bytes": float(self.gating.extra_bytes)}
        flips = float(self.masks.count_flips())
        return {**self.level.measures(self.num_steps), "mask_flips": flips, **self.level.regulariser, **cost}
