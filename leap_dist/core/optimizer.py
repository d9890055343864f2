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

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from leap_dist.config.leap import LeapConfig
from leap_dist.config.sections import LEARNING_RATE, WEIGHT_DECAY
from leap_dist.core import host_state
from leap_dist.core import thresholds as th
from leap_dist.core.communicator import Communicator
from leap_dist.core.fragments import Fragment
from leap_dist.core.gate_values import GateValues
from leap_dist.core.gates import GatePlan
from leap_dist.core.gating import ELEMENT_MASK, EXP_AVG, EXP_AVG_SQ, LATENT, MASK, Gating, state_keys
from leap_dist.core.level import Level
from leap_dist.core.loaded import Loaded
from leap_dist.core.masks import Masks
from leap_dist.core.phases import Phase, Schedule
from leap_dist.core.stopwatch import Stopwatch
from leap_dist.core.update import learn_, update_, write_
from leap_dist.errors import UserError
from leap_dist.ops import dispatch as ops
from leap_dist.ops.reference import Adam

GATED = "leap_gated"  # key of a parameter group: True for the one that holds the gated tensors


class LeapAdamW(torch.optim.Optimizer):
    """AdamW that prunes as it steps.

    params: parameter groups; at most one carries `leap_gated: True` and holds the gated tensors, in whatever shards.
    Its key `no_decay` names gated tensors without weight decay. As in torch, parameters may be (name, parameter) pairs:
    `hosted` has them by name, also when the host has put shards in their place. `bind` must be called before the first
    step; a scheduler may change a group's "lr", which scales the score's rate with it: their ratio is to "base_lr",
    the rate that the group started with, or to "max_lr" where a scheduler has set that.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        plan: GatePlan,
        config: LeapConfig,
        lr: float = LEARNING_RATE,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = WEIGHT_DECAY,
    ) -> None:
        if config.total_steps is None:
            raise UserError("leap.total_steps: missing; give the number of optimizer steps of the whole run")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, GATED: False}
        super().__init__(params, defaults)
        self.hosted: dict[str, Tensor] = {}
        for group in self.param_groups:
            self.hosted |= zip(group.pop("param_names", ()), group["params"], strict=False)
            group["base_lr"] = group["lr"]
            group["no_decay"] = sorted(group.get("no_decay", ()))
        self.plan = plan
        self.config = config
        self.schedule = Schedule(config.total_steps, config.dense_fraction, config.settle_fraction, config.target)
        self.num_steps = 0
        self.num_left_out = 0
        self.check_gradient = False  # whether step() looks if the gradient is finite; under ZeRO DeepSpeed has
        self.level = Level(plan, config, self.schedule)
        self._gating: Gating | None = None
        self._communicator = Communicator()
        self._communicated = 0, 0  # collectives and bytes of the last step
        self._early: tuple[list[Tensor], Mapping[str, Any]] | None = None  # a state_dict loaded before `bind`

    # Binding

    @torch.no_grad()
    def bind(
        self,
        fragments: Sequence[Fragment],
        communicator: Communicator,
        copies: Mapping[Tensor, Tensor] = MappingProxyType({}),
    ) -> None:
        """Tell which parts of which tensors this rank's flat buffers hold, and make the whole state.

        copies: for each flat buffer that the host copies after a step, what forward passes read, in its shape.

        Raises UserError if the target is below what one unit in every gate keeps.
        """
        self.fragments = fragments
        gated = {f.flat for f in fragments if f.tensor in self.plan.covers}
        for fragment in fragments:
            flat = fragment.flat
            for key in state_keys(self.plan) if flat in gated else (EXP_AVG, EXP_AVG_SQ):
                if key not in self.state[flat]:
                    self.state[flat][key] = _initial(key, flat)
        no_decay = {name for group in self.param_groups if group[GATED] for name in group["no_decay"]}
        self._communicator = communicator
        if fragments:
            communicator.stopwatch = Stopwatch(fragments[0].flat.device)
        device = fragments[0].flat.device if fragments else torch.device("cpu")
        values = GateValues(self.plan, communicator, device, (EXP_AVG, EXP_AVG_SQ))
        self._gating = Gating(self.plan, fragments, values, self.state, communicator, no_decay)
        self.masks = Masks(self._gating)
        self.level.bind(self._gating, self.masks)
        self._loaded = Loaded(self._gating, fragments, copies)
        self._started = False
        if self._early is not None:
            host_state.restore(self, *self._early)
            self._early, self._started = None, True

    def states_of(self, flat: Tensor) -> dict[str, Tensor]:
        """The state tensors of a fragment's flat buffer, each of its shape."""
        values = self.gating.values
        return values.state if flat is values.flat else self.state[flat]

    @property
    def bound(self) -> bool:
        """Whether `bind` was called."""
        return self._gating is not None

    @property
    def gating(self) -> Gating:
        """The gates over this rank's fragments."""
        assert self._gating is not None, "LeapAdamW.bind comes before the first step"
        return self._gating

    @property
    def settled(self) -> bool:
        """Whether the density is exact and the masks are frozen."""
        return self.level.settled

    @property
    def kept_units(self) -> list[int]:
        """Of every gate, by the masks in place."""
        return self.level.kept_units

    @property
    def kept_weights(self) -> int:
        """Prunable weights that the masks in place keep."""
        return self.level.kept_weights

    @property
    def density(self) -> float:
        """Kept prunable weights / prunable weights, of the masks in place."""
        return self.level.density

    # The step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no closure
        """One optimizer step for the groups that hold parameters now (ZeRO calls once a group)."""
        assert closure is None, "LeapAdamW takes no closure"
        if not self._started:
            self._take_over()
        for flat in (flat for group in self.param_groups for flat in group["params"]):
            self._loaded.check(flat)
        if self.check_gradient and not self._gradient_is_finite():
            self.pass_over()
            return
        for group in self.param_groups:
            if group["params"] and group[GATED]:
                self._step_gated(group)
            elif group["params"]:
                self._step_plain(group)

    def _take_over(self) -> None:
        """Before the first step: weights that were loaded since `bind` are the start, as if they had been there."""
        if self._loaded.take_over():
            self.level.bind(self.gating, self.masks)
        self._started = True

    def _gradient_is_finite(self) -> bool:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        return bool(torch.isfinite(torch.nn.utils.get_total_norm(grads)))

    def pass_over(self) -> None:
        """A step whose update is left out, on every rank, because its gradient is not finite; the schedule moves."""
        self.num_left_out += 1
        self.num_steps += 1
        for state in self.state.values():
            state["step"] = self.num_steps

    def _adam(self, group: dict[str, Any], step: int, **changes: float) -> Adam:
        beta1, beta2 = group["betas"]
        values = {"lr": group["lr"], "eps": group["eps"], "weight_decay": 0.0, **changes}
        return Adam(beta1=beta1, beta2=beta2, step=step, **values)

    def _step_plain(self, group: dict[str, Any]) -> None:
        for param in group["params"]:
            if param.grad is None:
                continue
            state = self.state[param]
            state["step"] = state.get("step", 0) + 1
            adam = self._adam(group, state["step"], weight_decay=group["weight_decay"])
            weight, grad = param.detach().view(-1), param.grad.reshape(-1)
            ops.adamw_(weight, grad, state[EXP_AVG].view(-1), state[EXP_AVG_SQ].view(-1), adam)

    def _step_gated(self, group: dict[str, Any]) -> None:
        communicator = self._communicator
        communicator.stopwatch.restart()
        before, phase = (communicator.num_collectives, communicator.num_bytes), self.phase
        with communicator.stopwatch.measure("update"):
            self._update(group, phase)
        self.num_steps += 1
        if phase != "dense" and not self.settled:
            with communicator.stopwatch.measure("select"):
                self.level.hold(self.num_steps)
        write_(self.gating)
        self._communicated = communicator.num_collectives - before[0], communicator.num_bytes - before[1]

    def _update(self, group: dict[str, Any], phase: Phase) -> None:
        """Phases 1 and 2 of the step."""
        adam = self._adam(group, self.num_steps + 1, weight_decay=group["weight_decay"])
        if self.config.rule == "magnitude" or self.settled:
            update_(self.gating, adam)
        else:
            element_adam, unit_adam = (self._score_adam(group, elementwise) for elementwise in (True, False))
            self._update_gates(group, phase, unit_adam, *learn_(self.gating, adam, element_adam))

    def _score_adam(self, group: dict[str, Any], elementwise: bool) -> Adam:
        """For scores, whose rate a scheduler scales with the group's; where that starts at 0, scores keep theirs."""
        peak = group.get("max_lr", group["base_lr"])
        scale = group["lr"] / peak if peak > 0.0 else 1.0
        return self._adam(group, self.num_steps + 1, lr=self.config.score_rate(elementwise) * scale)

    @property
    def phase(self) -> Phase:
        """The phase of the step that comes next."""
        return "settle" if self.settled else self.schedule.phase(self.num_steps)

    def _update_gates(
        self, group: dict[str, Any], phase: Phase, unit_adam: Adam, sigma_grad: Tensor, unit_grad: Tensor
    ) -> None:
        """Phase 2 of the step: this rank's structured scores and thresholds."""
        for fragment in self.gating.own_scores:
            self._adam_on(fragment, unit_grad, unit_adam)
        if phase != "prune" or self.config.rule != "leap":
            return
        moves = self.num_steps + 1 - self.schedule.dense_end
        adam = self._adam(group, moves, lr=self.threshold_rate)
        if self.config.control == "paper":
            sigma_grad = sigma_grad + self.level.regulariser_gradient(sigma_grad, adam)
        sigma_grad = self.level.remaining.share_gradient(sigma_grad)
        for fragment in self.gating.own_thresholds:
            self._adam_on(fragment, sigma_grad, adam)

    def _adam_on(self, fragment: Fragment, grad: Tensor, adam: Adam) -> None:
        """Adam on this rank's fragment of gate values whose whole gradient is `grad`."""
        local = grad[fragment.start : fragment.start + fragment.length].to(fragment.flat, non_blocking=True)
        state = self.gating.values.state
        moments = fragment.view(state[EXP_AVG]), fragment.view(state[EXP_AVG_SQ])
        ops.adamw_(fragment.view(fragment.flat), local, *moments, adam)

    @property
    def threshold_rate(self) -> float:
        """The learning rate of the thresholds: as configured, or from the distance and the phase's length."""
        rate, projected = self.config.threshold_learning_rate, self.config.control == "projected"
        auto = self.schedule.threshold_rate(self.config.temperature, projected, elementwise=not self.plan.structured)
        return auto if rate == "auto" else rate

    @torch.no_grad()
    def settle(self) -> None:
        """Make the density exact and freeze the masks, now; does nothing where that is done."""
        if not self.settled:
            self.level.settle()
            write_(self.gating)

    # Checkpoints of the host

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with an entry "leap" for what is in no tensor of a parameter; of this rank's shards."""
        saved = super().state_dict()
        return saved if self._gating is None else {**saved, host_state.LEAP: host_state.entry(self)}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copy what `state_dict` gave, at the same number of ranks and ZeRO stage, into the bound tensors; before
        `bind` it is kept until then. The hosted weights are the host's to load.

        Raises UserError, with nothing changed, if it is of another optimizer, config, model or sharding.
        """
        flats = [flat for group in self.param_groups for flat in group["params"]]
        if self._gating is None:
            self._early = flats, state_dict
        else:
            host_state.restore(self, flats, state_dict)
            self._started = True

    # Our own checkpoints: tensors are the optimizer's state, the rest is this

    def progress(self) -> dict[str, Any]:
        """What a checkpoint has to hold besides tensors, JSON-able."""
        return {"num_steps": self.num_steps, **self.level.progress()}

    @torch.no_grad()
    def load_progress(self, saved: Mapping[str, Any]) -> None:
        """Go on from `progress()`, after the state's tensors were put in place. Collective."""
        self.num_steps, self._started = saved["num_steps"], True
        for state in self.state.values():
            state["step"] = self.num_steps
        self.level.load_progress(saved)

    # Reports

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """What to log of this step: density, scheduled level, R, keep ratios over gates, lambda; and its cost here.

        mask_flips: prunable weights whose mask is another than at the last report. The cost is this rank's, of the
        gated step: milliseconds by part (TIMINGS), collectives and the bytes handed to them, bytes of state beyond
        dense AdamW's. Collective: every rank calls it.
        """
        collectives, sent = self._communicated
        cost = {**self._communicator.stopwatch.milliseconds(), "leap_collectives": float(collectives)}
        cost |= {"leap_bytes_communicated": float(sent), "leap_extra_bytes": float(self.gating.extra_bytes)}
        sigma = self.gating.gather_thresholds()
        k = th.keep_ratio(sigma, self.config.temperature) if len(sigma) else torch.ones(1)
        remaining = self.level.remaining.ratio(k).item() if len(sigma) else 1.0
        return {
            "density": self.density,
            "level": self.schedule.level(self.num_steps),
            "keep_ratio_min": k.min().item(),
            "keep_ratio_max": k.max().item(),
            "keep_ratio_std": k.std(unbiased=False).item(),
            "remaining": remaining,
            "mask_flips": float(self.masks.count_flips()),
            **self.level.regulariser,
            **cost,
        }


def _initial(key: str, flat: Tensor) -> Tensor:
    """A fresh state tensor of the flat buffer's shape."""
    if key == LATENT:
        return flat.detach().clone()
    if key in (MASK, ELEMENT_MASK):
        return torch.ones_like(flat, dtype=torch.bool, requires_grad=False)
    return torch.zeros_like(flat, requires_grad=False)
