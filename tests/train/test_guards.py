"""Values that are no numbers, on real engines; ranks that are silent; memory that is short."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from leap_dist.config.job_file import parse_job
from leap_dist.train.guards import Heartbeats, memory_advice, spoiled
from leap_dist.zero.ranks import Ranks, is_short_of_memory
from tests.checkpoint.test_checkpoints import this_rank
from tests.peers.nets import GLOBAL_BATCH, batches, loss_of
from tests.ranks import RankError, RankPools
from tests.sweep.jobs import JOB
from tests.zero.test_engine import pruned_engine

BAD = {3, 30, 31}  # steps; in the dense and in the prune phase
TOTAL = 33


def test_a_loss_that_is_finite_keeps_its_gradient_and_another_spoils_it() -> None:
    for value, finite in ((0.3, True), (float("inf"), False), (float("nan"), False)):
        weight = torch.tensor([0.1, 7.0], requires_grad=True)
        loss = (weight * weight).sum() + value
        expected = torch.autograd.grad(loss, weight, retain_graph=True)[0]
        given = torch.autograd.grad(spoiled(loss), weight)[0]
        assert torch.equal(given, expected) if finite else bool(given.isnan().all())


def run_with_bad_steps(stage: int, where: str) -> dict[str, Any]:
    """What 33 steps leave, some of them with a loss or a gradient on the last rank that is no number."""
    from leap_dist.train.guards import BadSteps
    from leap_dist.zero.engine import gather_weights

    engine = pruned_engine("hybrid", stage, 1, {})
    ranks = this_rank()
    bad = BadSteps(engine, 2)
    size = GLOBAL_BATCH // ranks.world_size
    found: dict[str, Any] = {"too many": []}
    for step, (x, y) in enumerate(batches(TOTAL)):
        before = [weight.clone() for _, weight in gather_weights(engine)] if step in BAD else []
        spoil = step in BAD and ranks.rank == ranks.world_size - 1
        output = engine(x[ranks.rank * size :][:size])
        if spoil and where == "gradient":
            output.register_hook(lambda gradient: gradient / 0.0)
        loss = loss_of(output, y[ranks.rank * size :][:size])
        engine.backward(spoiled(loss + float("inf")) if spoil and where == "loss" else spoiled(loss))
        engine.step()
        if bad.after(loss.detach()):
            found["too many"].append(step)
        if step == 3:  # nothing is pruned yet
            after = [weight for _, weight in gather_weights(engine)]
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(bool(weight.isfinite().all()) for _, weight in gather_weights(engine))
    assert bool(engine.leap.gating.gather_thresholds().isfinite().all())
    found |= {"total": bad.total, "steps": engine.leap.num_steps, "density": engine.leap.density}
    message = bad.message(32, Path("here"))
    assert message.endswith("lower train.learning_rate, or look at the data; the last good checkpoint is here")
    assert bad.message(32, None).endswith("no checkpoint was written")
    return found


@pytest.mark.parametrize(
    ("stage", "world", "where"), [(0, 2, "loss"), (1, 1, "loss"), (2, 2, "gradient"), (3, 2, "loss")]
)
def test_a_step_that_is_not_finite_on_one_rank_is_left_out_on_all(
    ranks: RankPools, stage: int, world: int, where: str
) -> None:
    found = ranks(world).run(run_with_bad_steps, stage, where)
    assert all(other == found[0] for other in found)
    assert (found[0]["total"], found[0]["too many"], found[0]["steps"]) == (3, [31], TOTAL)
    assert found[0]["density"] < 0.9  # the schedule went on


def bad_fp16_steps() -> list[bool]:
    """Four steps that fp16 left out; of the last two the loss was finite on no rank, or on the first one alone."""
    from leap_dist.train.guards import BadSteps

    first = this_rank().rank == 0
    leap = SimpleNamespace(num_left_out=0)  # DeepSpeed has no fp16 on a CPU; what it left out is the same on all ranks
    bad = BadSteps(SimpleNamespace(leap=leap, fp16_enabled=lambda: True), 2)
    asked = []
    for own in (1.0, 1.0, float("nan"), 1.0 if first else float("inf")):
        leap.num_left_out += 1
        asked.append(bad.after(torch.tensor(own)))
    assert bad.total == 2
    return asked


def test_ranks_count_a_loss_alike_that_is_finite_on_one_of_them_under_fp16(ranks: RankPools) -> None:
    assert ranks(2).run(bad_fp16_steps) == [[False, False, False, True]] * 2


def overflows(scaler: Any) -> tuple[int, list[bool]]:
    """Six steps with finite losses that fp16 leaves out."""
    from leap_dist.train.guards import BadSteps

    optimizer, leap = SimpleNamespace(loss_scaler=scaler), SimpleNamespace(num_left_out=0)
    bad = BadSteps(SimpleNamespace(leap=leap, fp16_enabled=lambda: True, optimizer=optimizer), 3)
    asked = []
    for _ in range(6):
        scaler.update_scale(True)
        leap.num_left_out += 1
        asked.append(bad.after(torch.tensor(1.0)))
    return bad.total, asked


def overflows_by_scaler() -> list[tuple[int, list[bool]]]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

    return [overflows(DynamicLossScaler(2**3, 1000, 1, 1, False)), overflows(LossScaler(8.0))]


def test_fp16_steps_count_once_the_scale_cannot_fall_any_more(ranks: RankPools) -> None:
    """From 8 it falls to 4, 2 and 1, where DeepSpeed would end the run in an exception of its own."""
    ((falling, fixed),) = ranks(1).run(overflows_by_scaler)
    assert falling == (4, [False] * 4 + [True] * 2)
    assert fixed == (6, [False] * 2 + [True] * 4)


def test_memory_that_is_short_is_told_from_other_faults() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_short_of_memory(caught.value)
    assert is_short_of_memory(MemoryError()) and is_short_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_short_of_memory(RuntimeError("shapes")) and not is_short_of_memory(ValueError("out of memory"))


def test_what_is_said_where_memory_is_short() -> None:
    zero: dict[str, Any] = {"stage": 2}
    said = memory_advice(parse_job(JOB | {"zero_optimization": zero}), MemoryError("no more\nat all")).splitlines()
    assert said == [
        "not enough memory: no more; what helps:",
        "  lower train_micro_batch_size_per_gpu, now 8, and raise gradient_accumulation_steps, now 1, by the same "
        "factor: the run stays the same",
        "  raise zero_optimization.stage, now 2: ranks share more of the state",
        '  set zero_optimization.offload_optimizer to {"device": "cpu"}',
        "  lower data.max_length, now 128",
    ]
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    job = JOB | {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    assert len(memory_advice(parse_job(job), MemoryError()).splitlines()) == 2


def test_a_rank_is_silent_when_its_file_is_old(tmp_path: Path) -> None:
    beats = Heartbeats(tmp_path, Ranks(0, 3, torch.device("cpu")), minutes=10.0)
    for rank in range(2):
        (tmp_path / f"rank-{rank:05d}").write_text("process 7 on here")
    assert beats.silent() == {}  # rank 2 is done: it has taken its file away
    os.utime(tmp_path / "rank-00001", (0.0, time.time() - 601.0))
    assert beats.silent() == {1: "process 7 on here"}


def test_a_file_that_a_killed_run_has_left_ends_no_resume(tmp_path: Path) -> None:
    left = tmp_path / "rank-00001"
    left.write_text("process 7 on here")
    os.utime(left, (0.0, time.time() - 7200.0))
    with Heartbeats(tmp_path, Ranks(0, 2, torch.device("cpu")), minutes=10.0) as beats:
        assert beats.silent() == {}  # rank 1 of this run has not come yet
        os.utime(tmp_path / "rank-00000", (0.0, time.time() + 601.0))
        assert beats.silent() == {1: "process 7 on here"}


def wait_for_a_silent_rank(folder: str) -> None:
    """As a rank that waits in a collective for the other one, which does nothing any more."""
    said = os.open(f"{folder}/said", os.O_CREAT | os.O_WRONLY)
    os.dup2(said, 2)
    (Path(folder) / "rank-00001").write_text("process 7 on here")
    with Heartbeats(Path(folder), Ranks(0, 2, torch.device("cpu")), minutes=0.005):
        time.sleep(60)


def test_a_rank_that_waits_for_a_silent_one_names_it_and_ends(ranks: RankPools, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="rank 0 of 1 died with exit code 1"):
        ranks(1).run(wait_for_a_silent_rank, str(tmp_path))
    assert (
        (tmp_path / "said")
        .read_text()
        .startswith(
            "error: no sign of life for 0.005 minutes from rank 1 (process 7 on here); the other ranks wait for it "
        )
    )
