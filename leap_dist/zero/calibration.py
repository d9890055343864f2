"""Calibration: forward passes that show the inputs of gated layers, where no dense phase does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from leap_dist.core.inputs import Inputs
from leap_dist.core.optimizer import LeapAdamW
from leap_dist.errors import UserError
from leap_dist.zero.ranks import Ranks


def calibrate(engine: Any, batches: Iterable[Any], notify: Callable[[int, int], None] = lambda done, of: None) -> int:
    """Measure ||x_j||, the norms of what gated layers are given, for leap.score_init "activation"; before any mask.

    batches: what the engine is called with, of this rank: dicts by keyword, tuples and lists by position, or tensors.
    leap.calibration_batches of them are used over all ranks together, rounded up to as many on each. The passes run
    in evaluation mode, without gradients, and change no weight. `notify` is called after each with how many of this
    rank's are done, of how many. Returns how many counted, over all ranks.

    Raises UserError, on every rank, where scores start from something else or have started, and where no rank has a
    batch. Collective.
    """
    leap, ranks = getattr(engine, "leap", None), Ranks.here()
    if not isinstance(leap, LeapAdamW):
        raise UserError(f"engine: got a {type(engine).__name__}; allowed: one that leap_dist.initialize or attach made")
    inputs = _inputs_of(leap)
    own = list(islice(batches, -(-leap.config.calibration_batches // ranks.world_size)))
    counts = ranks.gather_objects(len(own))
    if not any(counts) or (engine.zero_optimization_stage() == 3 and not all(counts)):
        rank = counts.index(0)
        who = f"rank {rank} has" if any(counts) else "there is"
        raise UserError(f'batches: {who} none; allowed: at least one, or leap.score_init "magnitude", which needs none')
    with evaluating(engine), torch.no_grad():
        for number in range(max(counts)):
            if number < len(own):
                with _counting(inputs):
                    _call(engine, own[number])
            elif engine.zero_optimization_stage() == 3:  # the ranks gather weights in step
                _call(engine, own[-1])
            notify(number + 1, max(counts))
    inputs.pool()
    return sum(counts)


def _inputs_of(leap: LeapAdamW) -> Inputs:
    if leap.inputs is None:
        start = "magnitude" if leap.config.rule == "magnitude" else leap.config.score_init
        raise UserError(f'leap.score_init: scores start from "{start}", which looks at no inputs; leave out calibrate')
    if leap.level.started:
        raise UserError("engine: its scores have their start, and masks are made by them; calibrate a new engine")
    return leap.inputs


@contextmanager
def evaluating(engine: Any) -> Iterator[None]:
    """An engine in evaluation mode, and then as it was, each module of its own."""
    training = [module for module in engine.module.modules() if module.training]
    engine.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _counting(inputs: Inputs) -> Iterator[None]:
    inputs.calibrating = True
    try:
        yield
    finally:
        inputs.calibrating = False


def _call(engine: Any, batch: Any) -> None:
    def moved(value: Any) -> Any:
        return value.to(engine.device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        engine(**{key: moved(value) for key, value in batch.items()})
    elif isinstance(batch, tuple | list):
        engine(*map(moved, batch))
    else:
        engine(moved(batch))
