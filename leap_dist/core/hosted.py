"""What LeapAdamW is to its host: parameter groups, a state bound to the host's flat buffers, saved and loaded."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from leap_dist.config.leap import LeapConfig
from leap_dist.config.sections import LEARNING_RATE, WEIGHT_DECAY
from leap_dist.core import host_state
from leap_dist.core.communicator import Communicator
from leap_dist.core.fixed import Fixed
from leap_dist.core.fragments import Fragment
from leap_dist.core.gate_values import GateValues
from leap_dist.core.gates import GatePlan
from leap_dist.core.gating import EXP_AVG, EXP_AVG_SQ, Gating, make_states, state_keys
from leap_dist.core.inputs import Axes, Inputs
from leap_dist.core.level import Level
from leap_dist.core.loaded import Loaded
from leap_dist.core.masks import Masks
from leap_dist.core.measure import Measure
from leap_dist.core.phases import Phase, schedule_of
from leap_dist.core.rates import Rates
from leap_dist.core.stopwatch import Stopwatch
from leap_dist.core.update import write_
from leap_dist.errors import UserError

COUNTED = "num_steps", "num_left_out", "num_left_out_dense"
GATED = "leap_gated"  # key of a parameter group: True for the one that holds the gated tensors


class HostedOptimizer(torch.optim.Optimizer):
    """The state of LeapAdamW, without its step.

    params: parameter groups; at most one carries `leap_gated: True` and holds the gated tensors, in whatever shards.
    Its key `no_decay` names gated tensors without weight decay. As in torch, parameters may be (name, parameter) pairs:
    `hosted` has them by name, also when the host has put shards in their place. `bind` must be called before the first
    step. axes: of gated tensors, where scores start from what the weights are multiplied with (core/inputs.py); who has
    the model reports that to `inputs`. fixed: masks for all steps, in place of those that are learned. prior: masks
    that rule "gumbel" starts from. measure: what the target is a share of, where that is not the prunable weights;
    config.target is then its `share`. seed: of the noise of rule "gumbel".
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
        axes: Mapping[str, Axes] = MappingProxyType({}),
        fixed: Fixed | None = None,
        prior: Fixed | None = None,
        measure: Measure | None = None,
        seed: int = 0,
    ) -> None:
        if config.total_steps is None and config.mode == "train":
            raise UserError("leap.total_steps: missing; give the number of optimizer steps of the whole run")
        self.seed = seed
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, GATED: False}
        super().__init__(params, defaults)
        self.hosted: dict[str, Tensor] = {}
        for group in self.param_groups:
            self.hosted |= zip(group.pop("param_names", ()), group["params"], strict=False)
            group["base_lr"] = group["lr"]
            group["no_decay"] = sorted(group.get("no_decay", ()))
        self.plan = plan
        self.config = config
        self.schedule = schedule_of(config, plan, fixed=fixed is not None)
        self.num_steps = 0
        self.num_left_out = 0  # steps without an update, which Adam does not count
        self.num_left_out_dense = 0  # of them before the prune phase
        self.check_gradient = False  # whether step() looks if the gradient is finite; under ZeRO DeepSpeed has
        self.level = Level(plan, config, self.schedule, fixed, measure, prior)
        self.axes = axes
        self.why_start = ""  # why "auto" came to what scores start from, in words
        self.inputs: Inputs | None = None
        self.rates = Rates(plan, config, self.schedule)
        self._gating: Gating | None = None
        self.communicator = Communicator()
        self._early: tuple[list[Tensor], Mapping[str, Any]] | None = None  # a state_dict loaded before `bind`

    @torch.no_grad()
    def bind(
        self,
        fragments: Sequence[Fragment],
        communicator: Communicator,
        copies: Mapping[Tensor, Tensor] = MappingProxyType({}),
        everyone: Communicator | None = None,
    ) -> None:
        """Tell which parts of which tensors this rank's flat buffers hold, and make the whole state.

        copies: for each flat buffer that the host copies after a step, what forward passes read, in its shape.
        everyone: sums over all ranks that see data; the same as `communicator` where not given.

        Raises UserError if the target is below what one unit in every gate keeps.
        """
        self.fragments = fragments
        trains = self.config.mode == "train"
        moments = (EXP_AVG, EXP_AVG_SQ) if trains else ()
        keys = state_keys(self.plan, self.config)
        make_states(self.plan, fragments, copies, self.state, keys, in_place=not trains)
        no_decay = {name for group in self.param_groups if group[GATED] for name in group["no_decay"]}
        self.communicator = communicator
        if fragments:
            communicator.stopwatch = Stopwatch(fragments[0].flat.device)
        device = fragments[0].flat.device if fragments else torch.device("cpu")
        values = GateValues(self.plan, communicator, device, moments)
        self._gating = Gating(self.plan, keys, fragments, values, self.state, communicator, no_decay)
        self.masks = Masks(self._gating)
        if self.axes:
            self.inputs = Inputs(self.axes, communicator, everyone or communicator, device, strict=not self.why_start)
        self._bind_level()
        self._loaded = Loaded(self._gating, fragments, copies)
        self._started = False
        if self._early is not None:
            host_state.restore(self, *self._early)
            self._early, self._started = None, True

    def _bind_level(self) -> None:
        self.level.bind(self.gating, self.masks, self.inputs, self.seed)
        if self.level.fixed is not None:  # the density is what they keep
            self.config, self.schedule = self.level.config, self.level.schedule
            write_(self.gating)

    def states_of(self, flat: Tensor) -> dict[str, Tensor]:
        """The state tensors of a fragment's flat buffer, each of its shape."""
        values = self.gating.values
        return values.state if flat is values.flat else self.state[flat]

    def write(self) -> None:
        """The hosted weights become W * M, with soft masks where these are in place. Collective."""
        if soft := self.level.soft_in_place:
            soft.write_()
        else:
            write_(self.gating)

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
    def measure(self) -> Measure:
        """What the target is a share of, and the target."""
        return self.level.measure

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

    @property
    def phase(self) -> Phase:
        """The phase of the step that comes next."""
        return "settle" if self.settled else self.schedule.phase(self.num_steps)

    @property
    def next_update(self) -> int:
        """The number of the update that comes next, from 1."""
        return self.num_steps + 1 - self.num_left_out

    @property
    def next_pruning_update(self) -> int:
        """The same, counted from the first of the prune phase."""
        return self.next_update - (self.schedule.dense_end - self.num_left_out_dense)

    # Checkpoints of the host

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with an entry "leap" for what is in no tensor of a parameter; of this rank's shards."""
        saved = super().state_dict()
        return saved if self._gating is None else {**saved, host_state.LEAP: host_state.leap_entry(self)}

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
            self._loaded.forget()
            self._started = True

    # Our own checkpoints: tensors are the optimizer's state, the rest is this

    def plain_state(self) -> dict[str, Any]:
        """What a checkpoint has to hold besides tensors, JSON-able."""
        counted = {key: getattr(self, key) for key in COUNTED}
        return {**counted, **self.level.plain_state()}

    def take_counts(self, saved: Mapping[str, Any]) -> None:
        """The numbers of steps in a `plain_state()`; those of older versions count steps that were left out, too."""
        for key in COUNTED:
            setattr(self, key, saved.get(key, 0))

    @torch.no_grad()
    def load_plain_state(self, saved: Mapping[str, Any]) -> None:
        """Continue from `plain_state()`, after the state's tensors were put in place. Collective."""
        self.take_counts(saved)
        self._started = True
        for state in self.state.values():
            state["step"] = self.next_update - 1
        self._loaded.forget()
        self.level.load_plain_state(saved)
