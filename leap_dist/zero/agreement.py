"""Whether all ranks are configured alike, and prune alike: what has to be the same on every rank, compared."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from leap_dist.core.optimizer import LeapAdamW
from leap_dist.errors import UserError
from leap_dist.zero.binding import hosted_parameters
from leap_dist.zero.ranks import Ranks


def agreement(engine: Any, ranks: Ranks) -> None:
    """Raise RuntimeError, on every rank, if kept counts, thresholds or schedule differ between ranks. Collective.

    Masks are sharded, but every rank chooses them from these. 48 bytes a rank are gathered.
    """
    values = _values(engine)
    found = torch.stack(ranks.gather(torch.tensor([_digest(value) for value in values.values()])))
    wrong = [
        f"rank {rank} has other {', '.join(name for name, same in zip(values, row, strict=True) if not same)}"
        for rank, row in enumerate((found == found[0]).tolist())
        if not all(row)
    ]
    if wrong:
        raise RuntimeError(
            f"the ranks do not prune in the same way after step {engine.leap.num_steps}: compared with rank 0, "
            f"{'; '.join(wrong)}; resume from the last checkpoint, and check the machines of these ranks "
            "if it happens again"
        )


def same_settings(ranks: Ranks, settings: Mapping[str, Any], problem: str = "") -> None:
    """Raise UserError, on every rank, unless all ranks have the same settings and none has a problem. Collective.

    settings: JSON-able values by dotted key. What is gathered is a digest; the settings only where those differ.
    """
    if ranks.world_size == 1:
        if problem:
            raise UserError(problem)
        return
    texts = {key: json.dumps(value, default=str) for key, value in settings.items()}
    everyone = ranks.gather_objects((problem, _digest(json.dumps(texts, sort_keys=True).encode())))
    problems = {words: rank for rank, (words, _) in reversed(list(enumerate(everyone))) if words}
    if problems:
        everywhere = len(problems) == 1 and all(words for words, _ in everyone)
        lines = [words if everywhere else f"rank {rank}: {words}" for words, rank in problems.items()]
        raise UserError("\n".join(reversed(lines)))
    if len({digest for _, digest in everyone}) > 1:
        raise UserError(
            f"the ranks are configured differently: {first_difference(ranks.gather_objects(texts))}; "
            "give every rank the same"
        )


def same_outcome(ranks: Ranks, certificate: Mapping[str, Any]) -> None:
    """Raise RuntimeError, on every rank, unless all ranks have the same certificate. Collective."""
    if ranks.world_size > 1:
        found = ranks.gather_objects({key: json.dumps(value) for key, value in certificate.items()})
        if any(other != found[0] for other in found):
            raise RuntimeError(
                f"the ranks do not hold the same model: {first_difference(found)}; change it in the same "
                "way on every rank"
            )


def first_difference(found: Sequence[Mapping[str, str]]) -> str:
    """The first key whose values differ over ranks, with two of the values, and how many more there are."""
    keys = list(dict.fromkeys(key for values in found for key in values))
    differing = [key for key in keys if any(values.get(key) != found[0].get(key) for values in found)]
    key, first = differing[0], found[0].get(differing[0])
    other = next(rank for rank, values in enumerate(found) if values.get(key) != first)
    values = [(text or "nothing")[:100] for text in (first, found[other].get(key))]
    more = f"; {len(differing) - 1} more differ" if len(differing) > 1 else ""
    return f"{key}: rank 0 has {values[0]}, rank {other} has {values[1]}{more}"


def engine_settings(engine: Any) -> dict[str, Any]:
    """What an engine computes with, by dotted key."""
    return optimizer_settings(engine.leap) | {
        "train_micro_batch_size_per_gpu": engine.train_micro_batch_size_per_gpu(),
        "gradient_accumulation_steps": engine.gradient_accumulation_steps(),
        "gradient_clipping": engine.gradient_clipping(),
        "zero_optimization.stage": engine.zero_optimization_stage(),
        "bf16.enabled": engine.bfloat16_enabled(),
        "fp16.enabled": engine.fp16_enabled(),
        "parameters": [(name, *getattr(p, "ds_shape", p.shape)) for name, p in hosted_parameters(engine)],
    }


def optimizer_settings(leap: LeapAdamW) -> dict[str, Any]:
    """What LEAP's optimizer is configured with, by dotted key: its section, its gates, its groups."""
    found = {f"leap.{key}": value for key, value in leap.config.model_dump(mode="json").items()}
    found |= {f"gates.{gate.name}": f"{gate.num_units} units of {gate.slices}, {gate}" for gate in leap.plan.gates}
    for number, group in enumerate(leap.param_groups):
        found |= {f"param_groups[{number}].{key}": _shown(value) for key, value in group.items() if key != "params"}
    return found


def _shown(value: Any) -> Any:
    return sorted(value) if isinstance(value, frozenset | set) else value


def _values(engine: Any) -> dict[str, bytes]:
    """What has to be the same on every rank, by name."""
    leap = engine.leap
    return {
        "step": json.dumps(leap.num_steps).encode(),
        "phase": json.dumps(leap.settled).encode(),
        "kept counts": json.dumps([leap.kept_units, leap.kept_weights]).encode(),
        "λ": json.dumps([leap.level.regulariser, leap.level.calibration, leap.level.task_size.mean_square]).encode(),
        "thresholds": leap.gating.gather_thresholds().numpy().tobytes(),
        "unit masks": leap.gating.unit_mask.cpu().numpy().tobytes(),
    }


def _digest(value: bytes) -> int:
    return int.from_bytes(hashlib.sha256(value).digest()[:8], "little", signed=True)
