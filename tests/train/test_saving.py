"""When a run saves and stops: ranks agree, failures are reported, and what was asked of one rank is heeded by all."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from leap_dist.checkpoint.folders import checkpoints_in
from leap_dist.config.job_file import parse_job
from leap_dist.train.saving import MEETINGS, Meetings
from leap_dist.train.signals import Interrupted
from leap_dist.train.watch import Watch
from tests.checkpoint.test_checkpoints import this_rank
from tests.ranks import RankPools
from tests.sweep.jobs import JOB


def meet(asked_on: int, asked_at: int, minutes: float | None) -> list[tuple[int, bool, bool]]:
    """(step, stop, save) of every meeting up to the one that says to stop."""
    ranks = this_rank()
    meetings, told = Meetings(ranks, 0, minutes), []
    for done in range(1, 1000):
        time.sleep(0.002 * (ranks.rank + 1))  # clocks that differ
        if done >= meetings.next:
            stop, save = meetings.meet(done, ranks.rank == asked_on and done >= asked_at)
            told.append((done, stop, save))
            if stop:
                return told
    raise AssertionError("nobody was asked")


def test_ranks_stop_after_the_same_step_and_meet_seldom(ranks: RankPools) -> None:
    first, second = ranks(2).run(meet, 1, 300, None)
    assert first == second and not any(save for _, _, save in first)
    assert first[-1][0] >= 300 and len(first) <= 20
    assert MEETINGS == 0.5


def test_the_first_ranks_clock_says_when_to_save(ranks: RankPools) -> None:
    first, second = ranks(2).run(meet, 0, 200, 1e-9)
    assert first == second and all(save for _, _, save in first)
    alone = ranks(1).run(meet, 0, 7, None)[0]
    assert [step for step, _, _ in alone] == [1, 2, 3, 4, 5, 6, 7]


def run(folder: str, watch: Watch, **train: Any) -> tuple[str, str]:
    """What a job prints, and how it is interrupted."""
    from leap_dist.train.loop import run_job

    config = parse_job(JOB | {"train": JOB["train"] | train})
    printed, interrupted = io.StringIO(), ""
    with contextlib.redirect_stdout(printed):
        try:
            run_job(config, Path(folder), False, this_rank(), watch)
        except Interrupted as error:
            interrupted = str(error)
    return printed.getvalue(), interrupted


def run_with_a_broken_store(folder: str) -> tuple[str, str]:
    """A file is in the way of the checkpoints' folder between two saves."""
    place = Path(folder) / "checkpoints"

    def told(step: int, total: int, measures: Mapping[str, float]) -> None:
        if step == 1:
            place.touch()
        elif step == 20:
            place.unlink()

    return run(folder, Watch(notify=told), checkpoint_every=5)


def test_a_checkpoint_that_cannot_be_written_is_told_and_the_run_goes_on(ranks: RankPools, tmp_path: Path) -> None:
    printed, interrupted = ranks(1).run(run_with_a_broken_store, str(tmp_path / "run"))[0]
    warnings = [line for line in printed.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 3 and not interrupted  # those after 5, 10 and 15 steps
    assert "step-00000005 could not be written" in warnings[0] and warnings[0].endswith("; the run continues")
    assert (tmp_path / "run" / "certificate.json").is_file()


def run_until_asked(folder: str, at: int) -> tuple[str, str]:
    """The last rank is asked to stop once `at` steps are done."""
    ranks, steps = this_rank(), [0]

    def told(step: int, total: int, measures: Mapping[str, float]) -> None:
        steps[0] = step

    def asked() -> str | None:
        return "SIGTERM" if steps[0] >= at and ranks.rank == ranks.world_size - 1 else None

    watch = Watch(notify=told, asked=asked)
    return run(folder, watch, checkpoint_every=None, keep_checkpoints=1)


def test_what_one_rank_is_asked_all_do_and_the_run_goes_on_without_being_told(ranks: RankPools, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (_, one), (_, other) = ranks(2).run(run_until_asked, str(folder), 7)
    assert one == other and one.startswith("stopped by SIGTERM after step ")
    (checkpoint,) = checkpoints_in(folder / "checkpoints")
    step = int(checkpoint.name.removeprefix("step-"))
    assert step >= 7 and one.endswith(f"saved; the same command resumes from step {step}")
    printed, interrupted = ranks(2).run(run_until_asked, str(folder), 10**6)[0]
    assert printed.startswith(f"{folder} holds an unfinished run of this job: it is resumed") and not interrupted
    left = {path.name for path in folder.iterdir()}
    assert {"certificate.json", "model"} <= left and not left & {"checkpoints", ".ranks"}


def run_beside_a_reference(folder: str, stop_at: int | None = None) -> tuple[str, str]:
    """The last rank is asked to stop when it has looked `stop_at` times, in the reference or in the run after it."""
    looks = [0]

    def asked() -> str | None:
        looks[0] += 1
        return "SIGTERM" if stop_at is not None and looks[0] >= stop_at else None

    return run(folder, Watch(asked=asked), dense_reference=True)


def run_until_the_reference_is_done(folder: str) -> tuple[str, str]:
    """The last rank is asked to stop as soon as the run after it begins."""
    ranks, done = this_rank(), Path(folder) / ".dense_reference/metrics.json"

    def asked() -> str | None:
        return "SIGTERM" if ranks.rank == ranks.world_size - 1 and done.exists() else None

    return run(folder, Watch(asked=asked), dense_reference=True)


def test_a_dense_reference_that_is_stopped_is_resumed_bit_for_bit(ranks: RankPools, tmp_path: Path) -> None:
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    assert ranks(1).run(run_beside_a_reference, whole)[0][1] == ""
    printed, interrupted = ranks(1).run(run_beside_a_reference, broken, 12)[0]
    assert interrupted == "stopped by SIGTERM after step 12: saved; the same command resumes from step 12"
    (step,) = [line for line in printed.splitlines() if line.startswith("step 1/")]
    assert "  dense  loss " in step and " R " not in step and " density " not in step  # nothing is pruned
    assert [path.name for path in Path(broken).iterdir()] == [".dense_reference"]

    printed, interrupted = ranks(1).run(run_beside_a_reference, broken, 33)[0]  # 28 steps of it, and 5 of the run
    assert f"{broken}/.dense_reference holds an unfinished run of this job: it is resumed" in printed
    assert interrupted.startswith("stopped by SIGTERM after step 5: saved")
    printed, interrupted = ranks(1).run(run_beside_a_reference, broken)[0]
    assert "dense reference: " not in printed and interrupted == ""
    found = [json.loads((Path(folder) / "certificate.json").read_text()) for folder in (whole, broken)]
    assert found[0] == found[1] and set(found[0]["metrics"]) == {"dense", "dense_reference", "pruned"}
    for folder in (whole, broken):
        assert not {".dense_reference", "checkpoints", ".ranks"} & {path.name for path in Path(folder).iterdir()}


def test_a_dense_reference_that_is_done_is_not_trained_again(ranks: RankPools, tmp_path: Path) -> None:
    """Before the run has a checkpoint; with another target, which is nothing to it; not with another rate."""
    folder = tmp_path / "run"
    (_, one), (_, other) = ranks(2).run(run_until_the_reference_is_done, str(folder))
    assert one == other and one.startswith("stopped by SIGTERM after step ")
    reference = folder / ".dense_reference"
    known = (reference / "metrics.json").read_text()
    assert not (reference / "checkpoints").exists()
    for left in folder.iterdir():
        if left != reference:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    refusal = ranks(2).run(refused_beside_a_reference, str(folder), {"train": {"learning_rate": 1e-4}})
    assert set(refusal) == {
        f"--output: the run in {reference} was started as another job; set this back, or choose another folder\n"
        "  train.learning_rate: before 3e-05, now 0.0001"
    }
    (reference / "metrics.json").write_text('{"accuracy": "high"}')
    refusal = ranks(2).run(refused_beside_a_reference, str(folder), {"leap": {"target": 0.3}})
    why = f"not the metrics of a dense reference; remove {reference} to train the dense reference again"
    assert set(refusal) == {f"{reference / 'metrics.json'}: {why}"}
    (reference / "metrics.json").write_text(known)
    refusal = ranks(2).run(refused_beside_a_reference, str(folder), {"leap": {"target": 0.3}})
    assert set(refusal) == {""}
    found = json.loads((folder / "certificate.json").read_text())
    assert found["metrics"]["dense_reference"] == json.loads(known) and found["target"] == 0.3


def refused_beside_a_reference(folder: str, changes: dict[str, Any]) -> str:
    """Why the job with these changes is refused; "" if it is run."""
    from leap_dist.errors import UserError
    from leap_dist.train.loop import run_job

    job = JOB | {"train": JOB["train"] | {"dense_reference": True}}
    job |= {section: job.get(section, {}) | settings for section, settings in changes.items()}
    try:
        run_job(parse_job(job), Path(folder), False, this_rank())
    except UserError as error:
        return str(error)
    return ""


def refused_before_the_reference(folder: str, section: str, settings: dict[str, Any]) -> tuple[str, str]:
    """What a job with a dense reference prints, and why it is refused."""
    from leap_dist.errors import UserError
    from leap_dist.train.loop import run_job

    train = JOB["train"] | {"dense_reference": True}
    config = parse_job(JOB | {"train": train, section: JOB.get(section, {}) | settings})
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(UserError) as refusal:
        run_job(config, Path(folder), False, this_rank())
    return printed.getvalue(), str(refusal.value)


@pytest.mark.parametrize(
    ("section", "settings", "why"),
    [
        ("leap", {"gates": ["head", "neuron"], "target": 0.001}, "leap.target: 0.001 cannot be reached"),
        ("tracking", {"mlflow_uri": "http://127.0.0.1:9"}, "MLflow at http://127.0.0.1:9 does not take the run"),
    ],
)
def test_a_mistake_is_refused_before_the_dense_reference(
    ranks: RankPools, tmp_path: Path, section: str, settings: dict[str, Any], why: str
) -> None:
    printed, refusal = ranks(1).run(refused_before_the_reference, str(tmp_path / "run"), section, settings)[0]
    assert why in refusal and "step " not in printed and not list(tmp_path.iterdir())


def run_into_nonsense(folder: str) -> str:
    """A rate at which no weight stays a number."""
    from leap_dist.errors import UserError

    try:
        run(folder, Watch(), learning_rate=1e30, warmup_fraction=0.0, checkpoint_every=1, max_bad_steps=4)
    except UserError as error:
        return str(error)
    return ""


def test_a_run_that_diverges_ends_with_one_message(ranks: RankPools, tmp_path: Path) -> None:
    said = ranks(1).run(run_into_nonsense, str(tmp_path / "run"))[0]
    assert said.startswith("train: the loss or the gradient was not finite in 4 steps in a row, up to step ")
    last = checkpoints_in(tmp_path / "run" / "checkpoints")[0]
    assert said.endswith(f"lower train.learning_rate, or look at the data; the last good checkpoint is {last}")


def test_the_best_settled_checkpoint_stays(ranks: RankPools, tmp_path: Path) -> None:
    _, interrupted = ranks(1).run(run_until_asked_late, str(tmp_path / "run"))[0]
    assert interrupted.startswith("stopped by SIGTERM after step 39")
    kept = [int(path.name.removeprefix("step-")) for path in checkpoints_in(tmp_path / "run" / "checkpoints")]
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row and row["step"] > 32}  # settled from 32 on
    best = min(losses, key=lambda step: (losses[step], -step))
    assert kept == sorted({39, best}, reverse=True) and best != 39


def run_until_asked_late(folder: str) -> tuple[str, str]:
    steps = [0]

    def told(step: int, total: int, measures: Mapping[str, float]) -> None:
        steps[0] = step

    watch = Watch(notify=told, asked=lambda: "SIGTERM" if steps[0] >= 39 else None)
    return run(folder, watch, checkpoint_every=1, keep_checkpoints=1, log_every=1)
