"""What a checkpoint holds of an engine: the states of its tensors, run by run, and its counters and schedules.

Nothing depends on how flat buffers are laid out, so other ranks or another ZeRO stage can read it. The hosted weights
under gates are W * M, made again from the latent weights and the masks.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from leap_dist.checkpoint.manifest import EngineState, LeapState, TensorEntry
from leap_dist.core.fragments import Fragment
from leap_dist.core.gate_values import gate_sizes
from leap_dist.core.gating import (
    ELEMENT_MASK,
    EXP_AVG,
    EXP_AVG_SQ,
    MASK,
    SCORE,
    SCORE_EXP_AVG,
    SCORE_EXP_AVG_SQ,
)
from leap_dist.core.inputs import INPUTS
from leap_dist.core.optimizer import LeapAdamW
from leap_dist.errors import UserError
from leap_dist.zero.binding import all_fragments, refresh_hosted, trained_shapes

HOSTED = "hosted"  # the masters of what no gate covers
ON_ELEMENTS = SCORE, SCORE_EXP_AVG, SCORE_EXP_AVG_SQ, ELEMENT_MASK
_SCALER = "cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"
_COUNTERS = "global_steps", "global_samples", "skipped_steps"


def stored_keys(leap: LeapAdamW, tensor: str) -> tuple[str, ...]:
    """The states of a tensor that are stored."""
    if tensor == INPUTS:
        return (HOSTED,)
    plan = leap.plan
    if tensor not in plan.covers:
        still = leap.config.frozen and tensor not in gate_sizes(plan)
        return (HOSTED,) if still else (HOSTED, EXP_AVG, EXP_AVG_SQ)
    elementwise = any(plan.gates[cover.gate].elementwise for cover in plan.covers[tensor])
    return tuple(key for key in leap.gating.keys if elementwise or key not in ON_ELEMENTS)


def tensor_table(engine: Any) -> dict[str, TensorEntry]:
    """Every tensor that is trained, the gates' own included: its size, and the dtypes of its states."""
    return {
        name: TensorEntry(
            numel=math.prod(shape),
            states={key: _dtype(name, key) for key in stored_keys(engine.leap, name)},
        )
        for name, shape in trained_shapes(engine).items()
    }


def _dtype(tensor: str, key: str) -> Literal["F32", "F64", "BOOL"]:
    """As safetensors names it."""
    if tensor == INPUTS:
        return "F64"
    return "BOOL" if key in (MASK, ELEMENT_MASK) else "F32"


def gate_table(engine: Any) -> tuple[tuple[str, int], ...]:
    """Every gate's name and number of units."""
    return tuple((f"{gate.granularity} {gate.name}", gate.num_units) for gate in engine.leap.plan.gates)


def persistent_buffers(engine: Any) -> dict[str, Tensor]:
    """The buffers that the model's state_dict has, such as running means, by name. Every rank has its own."""
    model = getattr(engine.module, "_orig_mod", engine.module)  # where it was compiled
    return {
        f"{prefix}.{name}" if prefix else name: buffer.detach()
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def buffer_key(name: str) -> str:
    """A buffer's name in a file."""
    return f"{name}/buffer"


def buffer_table(engine: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every buffer that is stored."""
    return {name: tuple(buffer.shape) for name, buffer in persistent_buffers(engine).items()}


def section_of(engine: Any) -> dict[str, Any]:
    """The settings of the leap section that a run continues by, JSON-able.

    Inputs are measured before the first step, and tokens count where rates follow from them.
    """
    config = engine.leap.config
    settings: dict[str, Any] = config.model_dump(mode="json", exclude={"calibration_batches"})
    return settings if config.budgeted else settings | {"tokens_per_step": None}


def fragment_states(engine: Any, fragment: Fragment) -> Iterator[tuple[str, Tensor]]:
    """(key, view of shape (length,)) of every state of a fragment that is stored."""
    for key in stored_keys(engine.leap, fragment.tensor):
        yield key, fragment.view(fragment.flat if key == HOSTED else engine.leap.states_of(fragment.flat)[key])


def written_by(engine: Any, rank: int) -> list[Fragment]:
    """The fragments that a rank writes: under stage 0 all ranks hold all, and the first writes it."""
    if engine.zero_optimization_stage() == 0 and rank > 0:
        return []
    return [fragment for fragment in all_fragments(engine) if fragment.length]


def random_states() -> dict[str, Tensor]:
    """The states of this rank's random number generators, uint8."""
    states = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random/cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random(states: Mapping[str, Tensor]) -> None:
    """Go on from `random_states()`; what is not among them stays as it is."""
    if "random/cpu" in states:
        torch.set_rng_state(states["random/cpu"])
    if "random/cuda" in states:
        torch.cuda.set_rng_state(states["random/cuda"])


def engine_state(engine: Any) -> EngineState:
    """Counters and schedules that live outside tensors. Between two updates only."""
    assert not unfinished(engine), "a checkpoint is taken between optimizer steps"
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return EngineState(
        leap=LeapState(**_with_tuples(engine.leap.plain_state())),
        lr=tuple(float(group["lr"]) for group in engine.leap.param_groups),
        betas=tuple((float(first), float(second)) for first, second in (g["betas"] for g in engine.leap.param_groups)),
        base_lr=tuple(float(group["base_lr"]) for group in engine.leap.param_groups),
        scheduler=scheduler_state(engine),
        scaler={name: getattr(scaler, name) for name in _SCALER if hasattr(scaler, name)},
        updates=engine.leap.num_steps,
        **{name: getattr(engine, name) for name in _COUNTERS},
    )


def unfinished(engine: Any) -> str:
    """How much of a step an engine has the gradients of, in words; "" between two steps.

    It finds the end of a step by counting, or the caller does: says so of each micro-batch, as Accelerate, or has
    every step() be one.
    """
    ends = engine._is_gradient_accumulation_boundary
    if ends is None and engine.managed_gradient_accumulation():
        together = engine.gradient_accumulation_steps()
        done = engine.micro_steps % together
        return f"after {done} of {together} micro-batches" if done else ""
    within = engine._unmanaged_backward_count if ends is None else not ends
    return "after some of its micro-batches" if within else ""


def scheduler_state(engine: Any) -> dict[str, Any] | None:
    """A scheduler's state without what it was made from; None if there is no scheduler.

    Raises UserError for one that does not say its state.
    """
    scheduler = engine.lr_scheduler
    if scheduler is None:
        return None
    if not (hasattr(scheduler, "state_dict") and hasattr(scheduler, "load_state_dict")):
        raise UserError(
            f"lr_scheduler: a {type(scheduler).__name__} has no state_dict and load_state_dict, so that a run with it "
            "cannot be resumed; allowed: a scheduler with both, such as those of torch and DeepSpeed"
        )
    return _changing(scheduler.state_dict())


def _changing(state: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers, texts and lists of them, of the schedulers that it is made of too; not functions and milestones."""
    kept: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, list):
            kept[key] = [_changing(one) if isinstance(one, Mapping) else one for one in value]
        elif isinstance(value, int | float | str | None):
            kept[key] = value
    return kept


def restore_engine(engine: Any, state: EngineState) -> None:
    """Go on from `engine_state()`, after the states of all fragments were put in place. Collective."""
    engine.leap.load_plain_state(state.leap.model_dump())
    engine.leap.write()
    for group, lr in zip(engine.leap.param_groups, state.lr, strict=True):
        group["lr"] = lr
    for group, betas in zip(engine.leap.param_groups, state.betas or (), strict=False):
        group["betas"] = betas
    for group, base_lr in zip(engine.leap.param_groups, state.base_lr or (), strict=False):
        group["base_lr"] = base_lr  # what scores' rates are scaled by
    if state.scheduler is not None:
        engine.lr_scheduler.load_state_dict(state.scheduler)
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    for name, value in state.scaler.items():
        if name in _SCALER and hasattr(scaler, name):
            setattr(scaler, name, value)
    engine.micro_steps = state.updates * engine.gradient_accumulation_steps()
    for name in _COUNTERS:
        setattr(engine, name, getattr(state, name))
    refresh_hosted(engine)


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
