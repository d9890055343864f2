"""The config.json of a run is a job: the same command resumes it, whatever was filled in of the model and the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from leap_dist.config.job_file import parse_job
from leap_dist.config.json_file import read_json
from leap_dist.run_folder import RESOLVED
from leap_dist.train.output import as_logged, check_same_job
from tests.checkpoint.test_checkpoints import this_rank
from tests.ranks import RankPools
from tests.tasks.conftest import speaker  # noqa: F401
from tests.train.test_stream_job import MODEL

ONE_SHOT = {"target": 0.5, "mode": "one_shot"}
KINDS: dict[str, dict[str, Any]] = {
    "leap": {"target": 0.5},
    "two of four, permuted": {"target": 0.5, "gates": ["2:4"], "permute": "greedy"},
    "heads and neurons": {"target": 0.5, "gates": ["head", "neuron"]},
    "from magnitude": {"target": 0.5, "score_init": "magnitude"},
    "from zero": {"target": 0.5, "score_init": "zero"},
    "paper": {"target": 0.5, "control": "paper"},
    "movement": {"target": 0.5, "rule": "movement"},
    "magnitude": {"target": 0.5, "rule": "magnitude"},
    "gumbel": {"target": 0.5, "rule": "gumbel"},
    "gumbel, trained": {"target": 0.5, "rule": "gumbel", "weights": "trained"},
    "frozen": {"target": 0.5, "weights": "frozen"},
    "one shot": ONE_SHOT,
    "fixed, from zeros": {"start": "zeros"},
    "fixed, from a folder": {"start": "masks"},
    "gumbel, from a folder": {"target": 0.5, "rule": "gumbel", "prior_mask": "masks"},
    "of all parameters": {"target": 0.9, "gates": ["neuron"], "measure": "parameters"},
    "of FLOPs": {"target": 0.9, "gates": ["neuron"], "measure": "flops"},
}
OF_ENCODERS: dict[str, dict[str, Any]] = {
    "batches that none look at": {"target": 0.5, "dense_fraction": 0, "calibration_batches": 8},
    "tokens that count nothing": {"target": 0.5, "tokens_per_step": 4096},
    "one shot by rows": ONE_SHOT | {"gates": ["row"], "calibration_batches": 8},
}


def resolved_of(folder: str, job: dict[str, Any], kinds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Run these kinds, on one rank; the config.json of each as it is written."""
    from leap_dist.export.masks import save_masks
    from leap_dist.run_folder import read_run
    from leap_dist.train.loop import run_job

    base = Path(folder)
    found: dict[str, Any] = {}
    for kind, leap in kinds.items():
        own = job | {"leap": leap}
        if leap.get("start") is not None:
            own["model"] = {"name": str(base / "one shot" / "model")}
        if leap.get("start") == "masks":
            (base / "masks").mkdir()
            save_masks(read_run(base / "one shot"), base / "masks")
            own["leap"] = {"start": str(base / "masks")}
        if "prior_mask" in leap:
            own["leap"] = leap | {"prior_mask": str(base / "masks")}
        run_job(parse_job(own), base / kind, False, this_rank())
        found[kind] = [own, json.loads((base / kind / "config.json").read_text())]
    return found


def check(found: dict[str, Any], folder: Path) -> None:
    """The same job, and the one that its config.json is, resume each run."""
    for kind, (own, resolved) in found.items():
        again = parse_job(resolved)
        assert parse_job(again.resolved()) == again
        for same in (own, resolved):
            assert check_same_job("--output", folder / kind, parse_job(same), 1) == []


def test_every_kind_of_run_can_be_resumed_and_started_from_its_own_config(
    ranks: RankPools,
    tmp_path: Path,
    speaker: Any,  # noqa: F811
) -> None:
    speaker.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("A model that is smaller answers sooner. " * 100)
    data = {"task": "lm", "train": str(tmp_path / "text.txt"), "validation": str(tmp_path / "text.txt")}
    job: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "model": {"from_config": MODEL},
        "data": data | {"max_length": 32, "tokenizer": str(tmp_path / "tokenizer")},
        "train": {"max_steps": 10, "learning_rate": 1e-3},
        "tracking": {"mlflow_uri": None},
    }
    (found,) = ranks(1).run(resolved_of, str(tmp_path), job, KINDS, timeout=300)
    assert list(found) == list(KINDS)
    check(found, tmp_path)
    tokens = {kind: resolved["leap"]["tokens_per_step"] for kind, (_, resolved) in found.items()}
    budgeted = [kind for kind, number in tokens.items() if number is not None]
    measured = ["of all parameters", "of FLOPs"]
    assert budgeted == ["leap", "two of four, permuted", "heads and neurons", "paper", *measured]
    assert {tokens[kind] for kind in budgeted} == {4 * 32}
    assert {found[kind][1]["leap"]["target"] for kind in measured} == {0.9}


def test_what_has_no_effect_on_an_encoder_is_no_change(ranks: RankPools, tmp_path: Path) -> None:
    job = read_json(Path("configs/ds_leap.json"))
    job |= {"train": {"max_steps": 10, "learning_rate": 1e-3}, "tracking": {"mlflow_uri": None}}
    (found,) = ranks(1).run(resolved_of, str(tmp_path), job, OF_ENCODERS, timeout=300)
    check(found, tmp_path)


def test_weights_of_a_teacher_that_were_filled_in(tmp_path: Path) -> None:
    """They are numbers in the run's folder, and "auto" in the job file."""
    job = {
        "train_micro_batch_size_per_gpu": 2,
        "model": {"name": "m"},
        "data": {"task": "glue/sst2"},
        "train": {"max_steps": 10},
        "leap": {"target": 0.5},
        "distill": {"teacher": "self"},
    }
    config = parse_job(job, "job.json")
    assert config.distill is not None
    started = config.model_copy(update={"distill": config.distill.weighed(False, False)})
    (tmp_path / RESOLVED).write_text(json.dumps(as_logged(started, 1)))
    assert check_same_job("--output", tmp_path, config, 1) == []
