"""A dense reference: resumed bit for bit, trained once, by one run of a sweep at a time."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from leap_dist.config.job_file import parse_job
from leap_dist.files import alone
from leap_dist.train.watch import Watch
from tests.checkpoint.test_checkpoints import this_rank
from tests.ranks import RankPools
from tests.sweep.jobs import JOB, run_without_ray, sweep_file
from tests.train.test_saving import run


def run_beside_a_reference(folder: str, stop_at: int | None = None) -> tuple[str, str]:
    """A rank is asked to stop when it has looked `stop_at` times, in the reference or in the run after it."""
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
    refused = ranks(2).run(refused_beside_a_reference, str(folder), {"train": {"learning_rate": 1e-4}})
    assert {why for _, why in refused} == {
        f"--output: the run in {reference} was started as another job; set this back, or choose another folder\n"
        "  train.learning_rate: before 3e-05, now 0.0001"
    }
    (reference / "metrics.json").write_text('{"accuracy": "high"}')
    refused = ranks(2).run(refused_beside_a_reference, str(folder), {"leap": {"target": 0.3}})
    reason = f"not the metrics of a dense reference; remove {reference} to train the dense reference again"
    assert {why for _, why in refused} == {f"{reference / 'metrics.json'}: {reason}"}
    (reference / "metrics.json").write_text(known)
    refused = ranks(2).run(refused_beside_a_reference, str(folder), {"leap": {"target": 0.3}})
    assert {why for _, why in refused} == {""}
    found = json.loads((folder / "certificate.json").read_text())
    assert found["metrics"]["dense_reference"] == json.loads(known) and found["target"] == 0.3


def refused_beside_a_reference(folder: str, changes: dict[str, Any]) -> tuple[str, str]:
    """What the job with these changes prints, and why it is refused; "" if it is run."""
    from leap_dist.errors import UserError
    from leap_dist.train.loop import run_job

    job = JOB | {"train": JOB["train"] | {"dense_reference": True}}
    job |= {section: job.get(section, {}) | settings for section, settings in changes.items()}
    printed, refusal = io.StringIO(), ""
    with contextlib.redirect_stdout(printed):
        try:
            run_job(parse_job(job), Path(folder), False, this_rank())
        except UserError as error:
            refusal = str(error)
    return printed.getvalue(), refusal


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
    printed, refusal = ranks(1).run(refused_beside_a_reference, str(tmp_path / "run"), {section: settings})[0]
    assert why in refusal and "step " not in printed and not list(tmp_path.iterdir())


def run_a_sweep(file: str, output: str) -> tuple[list[str], str]:
    """How its trials end without Ray, and what they print."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        return run_without_ray(file, output), printed.getvalue()


def test_trials_that_differ_only_in_how_they_prune_share_one(ranks: RankPools, tmp_path: Path) -> None:
    train = JOB["train"] | {"max_steps": 20, "dense_reference": True}
    vary = {"leap.gates": [["element"], ["2:4"]], "train.seed": [1, 2]}
    file, output = sweep_file(tmp_path, {"train": train}, vary=vary), tmp_path / "sweep"
    ((outcomes, printed),) = ranks(1).run(run_a_sweep, str(file), str(output), timeout=300)
    assert outcomes == ["done"] * 4 and printed.count("dense reference: ") == 2  # one for each seed
    trials = [json.loads(path.read_text()) for path in output.glob("*/certificate.json")]
    found = {(trial["seed"], trial["metrics"]["dense_reference"]["loss"]) for trial in trials}
    assert len(trials) == 4 and len(found) == 2
    assert not (output / ".dense_reference").exists()


def run_sharing(folder: str, references: str) -> tuple[str, float]:
    """What a job with a reference that others may train prints, and when it ends."""
    return run(folder, Watch(references=Path(references)), dense_reference=True)[0], time.time()


def test_one_run_at_a_time_trains_a_reference_that_is_shared(ranks: RankPools, tmp_path: Path) -> None:
    references = tmp_path / "references"
    printed, _ = ranks(2).run(run_sharing, str(tmp_path / "first"), str(references))[0]
    (reference,) = references.iterdir()  # no lock is left
    assert printed.count("dense reference: ") == 1
    (reference / "metrics.json").write_text('{"accuracy": 0.5}')
    left, entered = [0.0], threading.Event()

    def hold() -> None:
        with alone(reference.with_suffix(".lock"), 0.0):
            entered.set()
            time.sleep(4.0)
            left[0] = time.time()

    other = threading.Thread(target=hold)
    other.start()
    assert entered.wait(10.0)
    ended = ranks(2).run(run_sharing, str(tmp_path / "second"), str(references))
    other.join()
    assert all(when > left[0] > 0.0 for _, when in ended) and "dense reference: " not in ended[0][0]
    found = json.loads((tmp_path / "second/certificate.json").read_text())
    assert found["metrics"]["dense_reference"] == {"accuracy": 0.5}
