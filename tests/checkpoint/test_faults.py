"""Saves that fail lose only their own checkpoint, and every rank reports them; ranks that do not prune alike, too."""

import resource
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from leap_dist.checkpoint.checkpoints import CheckpointError, Checkpoints
from tests.checkpoint.test_checkpoints import load, this_rank
from tests.ranks import RankPools
from tests.zero.test_engine import pruned_engine, run_steps


def save_on_a_full_disk(folder: str, rank: int) -> dict[str, Any]:
    """Three saves, the second of which one rank cannot write; what each said, and what is left."""
    engine, checkpoints = pruned_engine("hybrid", 2, 1, {}), Checkpoints(Path(folder), this_rank())
    checkpoints.save(engine, {"step": 0})
    checkpoints.wait()
    run_steps(engine, 1, 0, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if this_rank().rank == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    checkpoints.save(engine, {"step": 1})
    told = ["", ""]
    run_steps(engine, 1, 1, 2)  # training goes on
    remove = shutil.rmtree
    with pytest.MonkeyPatch.context() as patch:  # a file system that takes its time
        patch.setattr(shutil, "rmtree", lambda *args, **options: (time.sleep(0.3), remove(*args, **options)))
        try:
            checkpoints.wait()
        except CheckpointError as error:
            told[0] = str(error)
    left = sorted(path.name for path in Path(folder).iterdir())
    torch.distributed.barrier()
    checkpoints.save(engine, {"step": 2})
    for thread in [thread for thread in threading.enumerate() if thread.name == "checkpoint"]:
        thread.join()  # until it has given up
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    run_steps(engine, 1, 2, 3)
    try:
        checkpoints.save(engine, {"step": 3})
    except CheckpointError as error:
        told[1] = str(error)
    checkpoints.wait()
    return {"told": told, "left": left}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_costs_no_checkpoint_but_its_own(ranks: RankPools, tmp_path: Path, rank: int) -> None:
    found = ranks(2).run(save_on_a_full_disk, str(tmp_path), rank)
    assert found[0] == found[1]
    for told in found[0]["told"]:
        assert f"File too large; the part of rank {rank} takes" in told and "older checkpoints are as they were" in told
    assert found[0]["left"] == ["step-00000000"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000000", "step-00000003"]
    assert ranks(2).run(load, "hybrid", 2, str(tmp_path)) == [{"step": 3}] * 2


def save_and_wait(folder: str, progress: Any) -> None:
    checkpoints = Checkpoints(Path(folder), this_rank())
    checkpoints.save(pruned_engine("row", 2, 1, {}), progress)
    checkpoints.wait()


def test_a_folder_that_cannot_be_made_and_what_is_not_json(ranks: RankPools, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match=r"step-00000000 could not be written: .*; nothing is written yet, "):
        ranks(2).run(save_and_wait, str(tmp_path / "checkpoints"), {})
    with pytest.raises(CheckpointError, match="a checkpoint failed: ValidationError: "):
        ranks(1).run(save_and_wait, str(tmp_path / "other"), {"step": {1, 2}})
    assert list((tmp_path / "other").iterdir()) == []


def disagree(rank: int) -> None:
    from leap_dist.zero.agreement import agreement

    engine = pruned_engine("row", 2, 1, {})
    agreement(engine, this_rank())
    if this_rank().rank == rank:
        engine.leap.kept_units[0] -= 1
        engine.leap.level.settled = True
    agreement(engine, this_rank())


def disagree_in_all_else(rank: int) -> None:
    from leap_dist.zero.agreement import agreement

    engine = pruned_engine("row", 2, 1, {})
    if this_rank().rank == rank:
        engine.leap.num_steps += 1
        engine.leap.level.calibration *= 2
        engine.leap.gating.unit_mask[0] ^= True
    agreement(engine, this_rank())


def test_ranks_that_do_not_prune_alike_are_named(ranks: RankPools) -> None:
    with pytest.raises(RuntimeError, match="rank 1 has other step, λ, unit masks; resume from"):
        ranks(2).run(disagree_in_all_else, 1)
    with pytest.raises(
        RuntimeError, match="after step 0: compared with rank 0, rank 2 has other phase, kept counts; resume from"
    ):
        ranks(3).run(disagree, 2)
