"""The cost of pruning in a training step: dense, LEAP by granularity, and masks in the forward pass, in one run.

Every variant takes a step in turn, in another order each round, so that slow spells and neighbours hit all alike. All
are in the prune phase with their masks active. Before anything is timed, LEAP is checked against the oracle on a small
model, under the same stage and ranks.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import leap_dist
from leap_dist.bench.forecast import empty_task
from leap_dist.bench.processes import on_ranks
from leap_dist.config.job_file import parse_leap
from leap_dist.config.sections import ModelConfig
from leap_dist.core.oracle import Oracle
from leap_dist.errors import UserError
from leap_dist.machine import machine, wait_for_device
from leap_dist.models.load import load_model
from leap_dist.models.plan import make_plan
from leap_dist.zero.dense import initialize_dense
from leap_dist.zero.engine import gather_weights

GATES = {"element": ["element"], "block:16x16": ["block:16x16"], "head+neuron": ["head", "neuron"]}
DENSE, DENSE_FUSED, ORACLE = "dense", "dense, fused AdamW", "oracle, element"
TINY: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 128,
}
TASK = "builtin/clock"  # two classes
LR = 1e-5
MAX_NORM = 1.0  # gradients are clipped to it
WARM_UP = 3  # rounds that are not timed
PHASE = {  # masks from the first step on, which no input has been seen before
    "target": 0.2,
    "total_steps": 1000,
    "dense_fraction": 0.0,
    "score_init": "magnitude",
}
CHECK = {"score_init": "magnitude", "target": 0.3, "total_steps": 12, "dense_fraction": 0.1, "settle_fraction": 0.2}
CHECK_LR, CHECK_STEPS = 1e-3, 12
TOLERANCE = 1e-4  # relative, of a tensor after CHECK_STEPS; measured: below 1e-5


@dataclass(frozen=True)
class Setting:
    """What is timed: a folder or hub id (None: a tiny model), sentences and tokens of a rank's batch, ZeRO stage."""

    model: str | None = None
    batch: int = 32
    length: int = 64
    stage: int = 2
    ranks: int = 1
    steps: int = 9

    def check(self) -> None:
        """Raise UserError for a value that cannot be."""
        for name in ("batch", "length", "ranks", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}: got {getattr(self, name)}; allowed: an integer >= 1")
        if self.stage not in range(4):
            raise UserError(f"--stage: got {self.stage}; allowed: 0, 1, 2 or 3")


def bench_overhead(setting: Setting) -> dict[str, Any]:
    """Median seconds of a step and ratios to dense, by variant; JSON-able. RuntimeError if the check fails."""
    setting.check()
    where = machine()
    return {"machine": where, **asdict(setting), **on_ranks(setting.ranks, measure, setting)[0]}


def measure(setting: Setting) -> dict[str, Any]:
    """What every rank does: check, then time."""
    errors = {name: check_against_oracle(gates, setting.stage) for name, gates in GATES.items()}
    if wrong := [f"{name}: {error:.1e}" for name, error in errors.items() if not error <= TOLERANCE]:
        raise RuntimeError(f"LEAP's weights differ from the oracle's, nothing is reported: {', '.join(wrong)}")
    steps, notes = variants(setting)
    rows = with_ratios(time_steps(steps, setting.steps))
    about = {"device": str(_device()), "threads": torch.get_num_threads(), "notes": notes}
    return {**about, "error_to_oracle": errors, "variants": rows}


# ---------------------------------------------------------------------------------------------- variants


def variants(setting: Setting) -> tuple[dict[str, Callable[[], Any]], list[str]]:
    """A function for one training step of each, and notes on what is left out or not alike."""
    named = ModelConfig(name=setting.model) if setting.model else ModelConfig(from_config=TINY)
    model = load_model(named, empty_task(TASK)).eval()  # no dropout: all variants see the same work
    batch = random_batch(model, setting)
    config = deepspeed_keys(setting.stage, setting.batch)
    notes: list[str] = []
    steps: dict[str, Callable[[], Any]] = {}
    for name, fused in ((DENSE, False), (DENSE_FUSED, True)):
        steps[name] = partial(engine_step, initialize_dense(copy.deepcopy(model), config, LR, fused), batch)
    for name, gates in GATES.items():
        section = {"leap": {**PHASE, "gates": gates}, "train": {"learning_rate": LR}}
        try:
            engine, *_ = leap_dist.initialize(model=copy.deepcopy(model), config={**config, **section})
        except UserError as error:
            notes.append(f"without {name}: {error}")
            continue
        steps[name] = partial(engine_step, engine, batch)
    steps[ORACLE] = oracle_step(model, batch)
    if _device().type != "cpu":
        notes.append(f"{ORACLE}: on the CPU")
    if setting.ranks > 1:
        notes.append(f"{ORACLE}: on each rank alone, without reducing anything; the others share the work of all ranks")
    return steps, notes


def deepspeed_keys(stage: int, batch: int) -> dict[str, Any]:
    """DeepSpeed's keys."""
    zero = {"stage": stage}
    return {
        "train_micro_batch_size_per_gpu": batch,
        "zero_optimization": zero,
        "gradient_clipping": MAX_NORM,
        "steps_per_print": 10**9,
    }


def engine_step(engine: Any, batch: dict[str, Tensor]) -> None:
    """Forward, backward, optimizer step."""
    engine.backward(engine(**batch).loss)
    engine.step()


def loss_of(batch: dict[str, Tensor], forward: Callable[..., Any]) -> Tensor:
    """The loss of a batch."""
    loss: Tensor = forward(**batch).loss
    return loss


def oracle_step(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Any]:
    """A step of the paper's way: a sort and a mask for every matrix in every forward pass."""
    config = parse_leap({**PHASE, "gates": GATES["element"]})
    own = copy.deepcopy(model).cpu()
    oracle = Oracle(own, make_plan(own, config), config, lr=LR, max_norm=MAX_NORM)
    batch = {name: values.cpu() for name, values in batch.items()}
    return partial(oracle.step, partial(loss_of, batch))


def random_batch(model: Any, setting: Setting) -> dict[str, Tensor]:
    """Token ids at random, every token real."""
    config, shape = model.config, (setting.batch, setting.length)
    most = getattr(config, "max_position_embeddings", None) or setting.length
    if setting.length > most:
        raise UserError(f"--length: got {setting.length}; allowed: at most {most}, the positions of the model")
    if config.pad_token_id is None:
        config.pad_token_id = 0  # decoders look for the last token that is none
    batch = {
        "input_ids": torch.randint(2, config.vocab_size, shape),
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "labels": torch.randint(0, 2, shape[:1]),
    }
    return {name: values.to(_device()) for name, values in batch.items()}


def _device() -> torch.device:
    return torch.accelerator.current_accelerator() or torch.device("cpu")


# ---------------------------------------------------------------------------------------------- timing


def with_ratios(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median and fastest step of each variant with ratios to dense; neighbours disturb the fastest least."""
    rows: dict[str, dict[str, float]] = {}
    for name, values in seconds.items():
        median, fastest = statistics.median(values), min(values)
        ratio, fastest_ratio = median / statistics.median(seconds[DENSE]), fastest / min(seconds[DENSE])
        rows[name] = {"seconds": median, "ratio": ratio, "fastest": fastest, "fastest ratio": fastest_ratio}
    return rows


def time_steps(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every step by name; a step lasts until the slowest rank has ended it."""
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for done in range(WARM_UP + rounds):
        for name, step in order.sample(list(steps.items()), len(steps)):
            dist.barrier()
            started = time.perf_counter()
            step()
            wait_for_device()
            if done >= WARM_UP:
                seconds[name].append(time.perf_counter() - started)
    table = torch.tensor(list(seconds.values()), device=_device())
    dist.all_reduce(table, op=dist.ReduceOp.MAX)
    return dict(zip(seconds, table.tolist(), strict=True))


# ---------------------------------------------------------------------------------------------- correctness


def check_against_oracle(gates: list[str], stage: int) -> float:
    """Largest relative error of a tensor of W * M after a short run through all phases, engine against oracle.

    Biases of keys are left as they are: they change nothing, and their gradient is rounding.
    """
    model = _small_model()
    config = parse_leap({**CHECK, "gates": gates})
    batches = _small_batches()
    plan = make_plan(model, config)
    vectors = [name for name, p in model.named_parameters() if p.dim() < 2]
    oracle = Oracle(copy.deepcopy(model), plan, config, lr=CHECK_LR, no_decay=vectors, max_norm=MAX_NORM)
    section = {"leap": config.model_dump(mode="json"), "train": {"learning_rate": CHECK_LR}}
    engine, *_ = leap_dist.initialize(model=model, config={**deepspeed_keys(stage, 8), **section})
    for batch in batches:
        oracle.step(partial(loss_of, batch))
        engine_step(engine, {name: values.to(engine.device) for name, values in batch.items()})
    expected = oracle.masked_weights()
    errors = [_relative_error(weight, expected[name].detach()) for name, weight in gather_weights(engine)]
    engine.destroy()
    return max(errors)


def _small_model() -> Any:
    torch.manual_seed(0)
    model = load_model(ModelConfig(from_config={**TINY, "initializer_range": 0.1}), empty_task(TASK)).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith("key.bias"))
    return model


def _small_batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, TINY["vocab_size"], (CHECK_STEPS, 8, 12), generator=generator)
    labels = torch.randint(0, 2, (CHECK_STEPS, 8), generator=generator)
    return [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]


def _relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12)).item()
