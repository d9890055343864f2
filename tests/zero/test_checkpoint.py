"""A run that is stopped and resumed ends with the same bits as one that is not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from leap_dist.errors import UserError
from tests.ranks import RankPools
from tests.zero.test_engine import STEPS, pruned_engine, run_steps

STOPS = [3, 40, 90]  # in the dense, the prune and the settle phase


def this_rank() -> Any:
    from leap_dist.zero.ranks import Ranks

    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), torch.device("cpu"))


def outcome(engine: Any) -> dict[str, Any]:
    import leap_dist

    certificate = leap_dist.finalize(engine)
    thresholds = engine.leap.gating.gather_thresholds()
    return {**certificate, "thresholds": thresholds.tolist(), "random": torch.rand(3).tolist()}


def undisturbed(kind: str, stage: int, changes: dict[str, Any]) -> dict[str, Any]:
    engine = pruned_engine(kind, stage, 1, changes)
    torch.manual_seed(5)
    run_steps(engine, 1, 0, STEPS)
    return outcome(engine)


def interrupted(kind: str, stage: int, changes: dict[str, Any], folder: str) -> dict[str, Any]:
    """Save and start over with a new engine in every phase."""
    from leap_dist.zero.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint

    done = 0
    for stop in [*STOPS, STEPS]:
        engine = pruned_engine(kind, stage, 1, changes)
        torch.manual_seed(5 if done == 0 else 99)
        if done:
            checkpoint = latest_checkpoint(Path(folder))
            assert checkpoint is not None
            assert load_checkpoint(engine, checkpoint, this_rank()) == {"step": done}
        run_steps(engine, 1, done, stop)
        done = stop
        if stop < STEPS:
            save_checkpoint(engine, Path(folder), this_rank(), {"step": stop})
    return outcome(engine)


CASES = [
    ("element", 0, 1, {}),
    ("element", 2, 2, {}),
    ("element", 3, 2, {"control": "paper"}),
    ("hybrid", 1, 2, {}),
    ("hybrid", 3, 1, {}),
    ("row", 2, 1, {"rule": "magnitude"}),
    ("head+2:4", 3, 2, {}),
]


@pytest.mark.parametrize(("kind", "stage", "world", "changes"), CASES)
def test_resumes_bit_for_bit(
    ranks: RankPools, tmp_path: Path, kind: str, stage: int, world: int, changes: dict[str, Any]
) -> None:
    expected = ranks(world).run(undisturbed, kind, stage, changes)
    resumed = ranks(world).run(interrupted, kind, stage, changes, str(tmp_path))
    assert resumed == expected
    assert [path.name for path in tmp_path.iterdir()] == [f"step-{STOPS[-1]:08d}"]  # older ones are gone


def save_once(folder: str) -> str:
    from leap_dist.zero.checkpoint import save_checkpoint

    engine = pruned_engine("hybrid", 2, 1, {})
    run_steps(engine, 1, 0, 5)
    return str(save_checkpoint(engine, Path(folder), this_rank(), {"step": 5}))


def load_once(checkpoint: str) -> None:
    from leap_dist.zero.checkpoint import load_checkpoint

    load_checkpoint(pruned_engine("hybrid", 2, 1, {}), Path(checkpoint), this_rank())


def test_another_number_of_ranks_is_refused_and_no_pickle_is_written(ranks: RankPools, tmp_path: Path) -> None:
    checkpoint = Path(ranks(1).run(save_once, str(tmp_path))[0])
    assert {path.suffix for path in checkpoint.iterdir()} == {".json", ".safetensors"}
    assert json.loads((checkpoint / "state.json").read_text())["progress"] == {"step": 5}
    with pytest.raises(UserError, match="was written by 1 ranks, this run has 2"):
        ranks(2).run(load_once, str(checkpoint))
