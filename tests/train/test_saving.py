"""When a run saves and stops: ranks agree, failures are reported, and what was asked of one rank is heeded by all."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from leap_dist.checkpoint.folders import checkpoints_in
from leap_dist.config.job_file import parse_job
from leap_dist.train import saving
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


def one_shot_until_asked(folder: str, at: int) -> tuple[int, str]:
    """How often the last rank looks whether it is asked to stop, which it is the `at`-th time; how it ends."""
    from leap_dist.train.loop import run_job

    ranks, looks = this_rank(), [0]

    def asked() -> str | None:
        looks[0] += 1
        return "SIGTERM" if looks[0] == at and ranks.rank == ranks.world_size - 1 else None

    config = parse_job({key: JOB[key] for key in JOB if key != "train"} | {"leap": {"target": 0.5, "mode": "one_shot"}})
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            run_job(config, Path(folder), False, ranks, Watch(asked=asked))
    except Interrupted as error:
        return looks[0], str(error)
    return looks[0], ""


def test_one_shot_is_left_after_any_batch(ranks: RankPools, tmp_path: Path) -> None:
    """Of both evaluations and the calibration: a batch of a language model takes long, and nothing can be saved."""
    each, calibration = 37, 8  # batches of a rank
    batches = 2 * each + calibration
    assert ranks(2).run(one_shot_until_asked, str(tmp_path / "whole"), 0)[1] == (batches, "")
    said = "stopped by SIGTERM after step 0: nothing was saved"
    for at in (3, each + 3, batches):
        assert ranks(2).run(one_shot_until_asked, str(tmp_path / f"{at}"), at) == [(at, said)] * 2
        assert not (tmp_path / f"{at}" / "certificate.json").exists()


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


def run_cut_off_at_the_end(folder: str, worth: float, **train: Any) -> str:
    """What cuts a run off in its last evaluation, if training for `worth` seconds is saved before it."""
    from leap_dist.train import loop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "WORTH", worth)
        patch.setattr(loop, "evaluate", cut_off)
        with pytest.raises(RuntimeError) as cut:
            run(folder, Watch(), checkpoint_every=None, **train)
    return str(cut.value)


def cut_off(*_: Any) -> dict[str, float]:
    raise RuntimeError("cut off")


def test_a_kill_in_the_last_evaluation_costs_no_steps(ranks: RankPools, tmp_path: Path) -> None:
    whole, broken, none = (tmp_path / name for name in ("whole", "broken", "none"))
    ranks(2).run(run_until_asked, str(whole), 10**6)
    for folder, worth, train in ((broken, 0.0, {}), (none, 0.0, {"checkpoint_minutes": None}), (none, 1e9, {})):
        assert ranks(2).run(partial(run_cut_off_at_the_end, **train), str(folder), worth) == ["cut off"] * 2
        steps = [path.name for path in checkpoints_in(folder / "checkpoints")]
        assert steps == ([] if folder == none else ["step-00000040"])
    before = (broken / "metrics.jsonl").read_text()
    printed, _ = ranks(2).run(run_until_asked, str(broken), 10**6)[0]
    assert "it is resumed" in printed and "step " not in printed and before == (broken / "metrics.jsonl").read_text()
    assert (broken / "certificate.json").read_text() == (whole / "certificate.json").read_text()


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
