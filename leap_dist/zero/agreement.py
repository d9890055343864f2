"""Whether all ranks prune alike: what is the same on every rank by construction, compared."""

import hashlib
import json
from typing import Any

import torch

from leap_dist.zero.ranks import Ranks


def agreement(engine: Any, ranks: Ranks) -> None:
    """Raise RuntimeError, on every rank, if kept counts, thresholds or schedule differ between ranks. Collective.

    Masks are sharded, but every rank chooses them from these. 56 bytes a rank are gathered.
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
            f"ranks do not prune alike after step {engine.leap.num_steps}: than rank 0, {'; '.join(wrong)}; resume "
            "from the last checkpoint, and look at these ranks' machines if it happens again"
        )


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
