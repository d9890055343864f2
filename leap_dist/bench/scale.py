"""How the cost of pruning grows: with the ranks, counted on real ones and modelled up to 1024, and with the model.

The model of traffic and memory (bench/budget.py) has to agree with what real engines hand to collectives and hold, or
nothing is reported. Bytes are those that a rank hands over; on the wire a ring moves up to twice as many for a sum on
all ranks, and as many where each rank ends with a part.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

import leap_dist
from leap_dist.bench.budget import Hosting, engine_traffic, leap_traffic, total
from leap_dist.bench.forecast import Forecast, empty_task, forecast
from leap_dist.bench.overhead import TASK, TINY, deepspeed_keys, engine_step
from leap_dist.bench.processes import on_ranks
from leap_dist.config.job_file import parse_job
from leap_dist.config.sections import ModelConfig
from leap_dist.machine import machine
from leap_dist.models.load import load_model
from leap_dist.zero.binding import flat_partitions

COUNTED = (1, 2, 4, 8)
MODELLED = tuple(2**power for power in range(11))
GATES = {"element": ["element"], "head+neuron": ["head", "neuron"]}
STAGE = 2
SKIPPED, STEPS = 20, 8  # steps before the counted ones, in which brackets find their cuts, and the counted ones
LEAP = {"target": 0.2, "total_steps": 1000, "dense_fraction": 0.0}
GOAL = 1e-3  # LEAP's bytes to those of the bf16 gradients of BERT-base
BERT_BASE = "BERT-base"
LLAMA = {"model_type": "llama", "max_position_embeddings": 4096}
MODELS: dict[str, dict[str, Any]] = {
    BERT_BASE: {"model_type": "bert"},
    "BERT-large": {
        "model_type": "bert",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "Llama 7B": LLAMA,
    "Llama 70B": LLAMA
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
TOLERANCE = 0.01  # relative, of modelled bytes


def bench_scale(counted: Sequence[int] = COUNTED) -> dict[str, Any]:
    """Counted against modelled on real ranks, then the model's answers; JSON-able. RuntimeError where they disagree."""
    where = machine()
    rows = [row for ranks in counted for row in on_ranks(ranks, count_traffic)[0]]
    check_model(rows)
    jobs = {name: _job(BERT_BASE, gates, half=True) for name, gates in GATES.items()}
    ratios = {name: _ratio(job.at(ranks=2)) for name, job in jobs.items()}
    base, ratio = jobs["element"], ratios["element"]
    return {
        "machine": where,
        "notes": [_verdict(name, value) for name, value in ratios.items()],
        "counted": rows,
        "ranks": [rank_row(base.at(ranks)) for ranks in MODELLED],
        "models": [model_row(name, gates, half) for name in MODELS for gates in GATES for half in (False, True)],
        "bert_base_ratio": ratio,
        "goal": GOAL,
    }


def _verdict(gates: str, ratio: float) -> str:
    met = "met" if ratio <= GOAL else "missed"
    return f"gradients of BERT-base, {gates}: LEAP adds {ratio:.3%} to their reduction in bf16; {GOAL:.1%} is {met}"


# ---------------------------------------------------------------------------------------------- counted


def count_traffic() -> list[dict[str, Any]]:
    """On every rank: what real engines on a tiny model hand to collectives in a step and hold, beside the model."""
    return [_count_gates(name, gates) for name, gates in GATES.items()]


def _count_gates(name: str, gates: list[str]) -> dict[str, Any]:
    torch.manual_seed(0)
    ranks = torch.distributed.get_world_size()
    model = load_model(ModelConfig(from_config=TINY), empty_task(TASK))
    config = deepspeed_keys(STAGE, batch=4) | {"leap": {**LEAP, "gates": gates}, "train": {"learning_rate": 1e-4}}
    engine, *_ = leap_dist.initialize(model=model, config=config)
    ids = torch.randint(2, TINY["vocab_size"], (4, 16), device=engine.device)
    batch = {"input_ids": ids, "labels": torch.zeros(4, dtype=torch.long, device=engine.device)}
    seen = []
    for _ in range(SKIPPED + STEPS):
        engine_step(engine, batch)
        seen.append(sent_by(engine))
    collectives, sent = statistics.median_low(seen[SKIPPED:])
    modelled = total(leap_traffic(engine.leap.plan, engine.leap.config, Hosting(STAGE, ranks)), name)
    memory = forecast_of(TINY, gates, half=False).at(ranks).memory(ranks, STAGE)
    row = {
        "gates": name,
        "ranks": ranks,
        "collectives": collectives,
        "modelled collectives": modelled.collectives,
        "bytes": sent,
        "modelled bytes": modelled.bytes,
        "state": held_state(engine),
        "modelled state": memory.state + memory.extra,
    }
    engine.destroy()
    return row


def sent_by(engine: Any) -> tuple[int, int]:
    """(collectives, bytes) that LEAP used in the last step, as its communicator counted them."""
    report = engine.leap.measures()
    return int(report["leap_collectives"]), int(report["leap_bytes_communicated"])


def held_state(engine: Any) -> int:
    """Bytes of this rank's fp32 partitions, of all tensors of the optimizer's state, and of the gates' own values."""
    values = engine.leap.gating.values
    state = [value for values in engine.leap.state.values() for value in values.values() if torch.is_tensor(value)]
    return sum(tensor.nbytes for tensor in (*state, *flat_partitions(engine), values.flat, *values.state.values()))


def check_model(rows: Sequence[dict[str, Any]]) -> None:
    """RuntimeError if the model's bytes are not those that were counted."""
    for row in rows:
        for key in ("collectives", "bytes", "state"):
            if abs(row[key] - row[f"modelled {key}"]) > TOLERANCE * row[key]:
                raise RuntimeError(f"the model of the cost is wrong, nothing is reported: {key} of {row}")


# ---------------------------------------------------------------------------------------------- modelled


def rank_row(job: Forecast) -> dict[str, Any]:
    """One number of ranks: bytes held and sent by each, LEAP's beside the dense job's."""
    ranks, stage = job.hosting.ranks, job.hosting.stage
    engine = engine_traffic(job.model, job.hosting)
    leap = total(leap_traffic(job.plan, job.config.leap, job.hosting), "")
    return {
        "ranks": ranks,
        "dense MB held": job.memory(ranks, stage, dense=True).total / 1e6,
        "LEAP MB held": job.memory(ranks, stage).total / 1e6,
        "dense MB sent": total(engine, "").bytes / 1e6,
        "LEAP MB sent": leap.bytes / 1e6,
        "collectives": leap.collectives,
        "% of gradients": 100 * _ratio(job),
    }


def model_row(name: str, gates: str, half: bool) -> dict[str, Any]:
    """One model: what LEAP adds on two ranks."""
    job = _job(name, GATES[gates], half).at(ranks=2)
    leap = total(leap_traffic(job.plan, job.config.leap, job.hosting), "")
    dense, pruned = job.memory(2, STAGE, dense=True), job.memory(2, STAGE)
    return {
        "model": name,
        "gates": gates,
        "bits": 16 if half else 32,
        "parameters M": sum(p.numel() for p in job.model.parameters()) / 1e6,
        "LEAP MB sent": leap.bytes / 1e6,
        "% of gradients": 100 * _ratio(job),
        "bytes held, LEAP / dense": pruned.total / dense.total,
    }


def _ratio(job: Forecast) -> float:
    """LEAP's bytes in a step to those of the reduced gradients; 0 where there is nothing to reduce."""
    engine = engine_traffic(job.model, job.hosting)
    return total(leap_traffic(job.plan, job.config.leap, job.hosting), "").bytes / engine[0].bytes if engine else 0.0


def _job(name: str, gates: list[str], half: bool) -> Forecast:
    return forecast_of(MODELS[name], gates, half)


def forecast_of(model: dict[str, Any], gates: list[str], half: bool) -> Forecast:
    """The forecast on one rank of a model by its config object."""
    job = {
        **deepspeed_keys(STAGE, batch=1),
        "bf16": {"enabled": half},
        "model": {"from_config": model},
        "data": {"task": TASK},
        "train": {"max_steps": LEAP["total_steps"]},
        "leap": {**LEAP, "gates": gates},
    }
    return forecast(parse_job(job), ranks=1)
