"""The run folder: what may be done with one that is there, and what is written to it during a run.

A run may be killed at any moment, so every file is either whole or not there; of metrics.jsonl a last line may be torn.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import IO, Any

from leap_dist.checkpoint.folders import latest_checkpoint
from leap_dist.config.job_file import parse_job
from leap_dist.config.json_file import read_json
from leap_dist.config.leap import BY_INPUTS
from leap_dist.config.section import show
from leap_dist.config.sections import UNRELATED_TO_RESULT, DataConfig, JobConfig
from leap_dist.console import console
from leap_dist.errors import UserError
from leap_dist.files import is_free, nearest, takes_files
from leap_dist.run_folder import (
    CERTIFICATE,
    CHECKPOINTS,
    DATA,
    JOURNAL,
    METRICS,
    RANKS,
    REFERENCE,
    RESOLVED,
    RESTORE,
    job_in,
    steps_in,
)
from leap_dist.secrets import hide_in
from leap_dist.tracking.completion import complete, is_incomplete
from leap_dist.tracking.datasets import file_digests
from leap_dist.train.batches import examples_per_step
from leap_dist.train.folder_writer import FolderWriter, needed

BATCH = "train_batch_size"
FREE_TO_CHANGE = (
    *UNRELATED_TO_RESULT,
    "train.eval_batch_size",
    "zero_optimization.",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "activation_checkpointing.",
    "steps_per_print",
    "wall_clock_breakdown",
)
"""Settings that may differ when a run is resumed: what it writes, and how the same steps are spread over ranks."""
FILLED = {"leap.score_init", "leap.tokens_per_step", "distill.hidden_weight", "distill.attention_weight"}
"""Settings that are filled in when the model and the data are there, where they are "auto"."""


def check_output(output: Path, resume: bool, config: JobConfig, world_size: int) -> bool:
    """Whether the folder holds a run to resume; False: a new one starts there.

    Without `resume` a run that is unfinished is resumed too. Raises UserError if the folder does not allow it.
    """
    option = "--resume" if resume else "--output"
    if (output / CERTIFICATE).is_file():
        done = f"the run in {output} is finished; its result is in {output / CERTIFICATE}"
        raise UserError(f"{option}: {done}" + ("" if resume else "; choose another folder, or remove it"))
    before = _started_as(output)
    if before is not None:
        steps_in(output)  # raises for what is none of ours
        lock(output).close()
        accepted = _check_same_job(option, output, before, as_logged(config, world_size), world_size)
        anew = config.leap.mode == "one_shot"
        if not anew and latest_checkpoint(output / CHECKPOINTS) is not None:
            check_same_data(option, output, config)
        _tell(output, accepted, "" if resume else "starts anew" if anew else "is resumed")
        return True
    if resume and not (output / REFERENCE / RESOLVED).is_file():  # which is resumed by itself
        raise UserError(f"--resume: there is no unfinished run in {output}; start without --resume")
    if output.exists() and not _is_as_new(output):
        raise UserError(
            f"--output: {output} exists and holds no run of this program; choose another folder, or remove it"
        )
    place = nearest(output)
    if not takes_files(place):
        raise UserError(f"--output: {output} cannot be made: {place} is not a folder that can be written to")
    return False


def check_same_job(option: str, output: Path, config: JobConfig, world_size: int) -> list[str]:
    """The settings of a run in `output` that have changed and do not matter to it, one text each.

    Raises UserError if the run was started as another job, or does not say as which.
    """
    before = _started_as(output)
    if before is None:
        raise UserError(
            f"{option}: the run in {output} has no {RESOLVED} that says what it was started as; choose another folder, "
            "or remove it"
        )
    return _check_same_job(option, output, before, as_logged(config, world_size), world_size)


def check_same_data(option: str, output: Path, config: JobConfig) -> None:
    """Raises UserError if the files of a run's data hold something else than when it was started."""
    file = output / DATA
    if not file.is_file():  # no files of its own, or of a version that wrote none
        return
    before, now = read_json(file, RESTORE), file_digests(config.data)
    if changed := [key for key in sorted(before.keys() & now.keys()) if before[key] != now[key]]:
        raise UserError(
            f"{option}: the run in {output} was started with other data: the files of {' and '.join(changed)} have "
            "changed since; set them back, or choose another folder"
        )


def _is_as_new(output: Path) -> bool:
    """Whether a folder is empty but for what a run that was killed at its very start may leave."""
    return output.is_dir() and all(path.name.startswith(".") or path.name == JOURNAL for path in output.iterdir())


def _started_as(output: Path) -> dict[str, Any] | None:
    """The job that the run in a folder was started as; None where there is no run.

    Settings that were not yet there in the version that started it have their defaults.
    """
    job = job_in(output)
    if job is None or "train" not in job:
        return None
    before: dict[str, Any] = hide_in(parse_job(job, str(output / RESOLVED)).resolved())  # as `shown` has the new one
    return before


def as_logged(config: JobConfig, world_size: int) -> dict[str, Any]:
    """The job as it is written and logged: every default filled in, the examples of a step, and no secrets."""
    batch = examples_per_step(config.deepspeed, world_size)
    resolved: dict[str, Any] = hide_in(config.resolved() | {BATCH: batch})
    return resolved


def _check_same_job(
    option: str, output: Path, before: Mapping[str, Any], now: Mapping[str, Any], world_size: int
) -> list[str]:
    """A run is resumed as the job that it was started as; the changes that do not matter to it, one text each."""
    old, new = _flat(before), _flat(now)
    if BATCH not in old:  # a folder that a sweep has made
        new.pop(BATCH)
    new["leap.total_steps"] = old["leap.total_steps"]  # filled in when the data are there; from what is compared here
    if new["leap.score_init"] == "auto" and old["leap.score_init"] not in BY_INPUTS:
        for key in ("leap.tokens_per_step", "leap.calibration_batches"):  # without effect on such a start: by default
            new[key] = old[key]
    for key in FILLED & old.keys():
        if new.get(key) == "auto":
            new[key] = old[key]
    if new["leap.start"] is not None:  # and the density that its masks keep
        new.setdefault("leap.target", old.get("leap.target"))
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    texts = {key: f"{key}: before {_shown(old, key)}, now {_shown(new, key)}" for key in changed}
    refused = [key for key in changed if not f"{key}.".startswith(_prefixes())]
    if refused:
        lines = [
            texts[key] + (f"; {_same_batch(old[key], now, world_size)}" if key == BATCH else "") for key in refused
        ]
        problem = f"{option}: the run in {output} was started as another job; set this back, or choose another folder"
        raise UserError("\n  ".join([problem, *lines]))
    return [texts[key] for key in changed]


def same_result(settings: Mapping[str, Any]) -> str:
    """What all jobs have in common that would end as this one, as a name; `settings` as logged."""
    kept = {key: value for key, value in _flat(settings).items() if not f"{key}.".startswith(_prefixes())}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def _prefixes() -> tuple[str, ...]:
    return tuple(key if key.endswith(".") else f"{key}." for key in FREE_TO_CHANGE)


def _same_batch(batch: int, now: Mapping[str, Any], world_size: int) -> str:
    """How as many examples as before come into a step."""
    together = now["train_micro_batch_size_per_gpu"] * world_size
    if batch % together:
        return f"choose a train_micro_batch_size_per_gpu with which {world_size} ranks make a step of {batch} examples"
    return f"set gradient_accumulation_steps to {batch // together}"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat


def _shown(settings: Mapping[str, Any], key: str) -> str:
    return show(settings[key]) if key in settings else "missing"


def _tell(output: Path, accepted: list[str], what: str) -> None:
    """Say in a line what becomes of an unfinished run, and what of it is new."""
    if what:
        console().print(f"{output} holds an unfinished run of this job: it {what}", markup=False, soft_wrap=True)
    if accepted:
        console().print(f"changed since it was started: {'; '.join(accepted)}", markup=False, soft_wrap=True)


# ---------------------------------------------------------------------------------------------- writing


def lock(output: Path) -> IO[str]:
    """An open file that keeps other processes out of the folder until it is closed, or this process ends."""
    folder = output / RANKS
    file_path = folder / "lock"
    if folder.is_symlink() or file_path.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"--output: {folder} is a link, or holds one; remove it, no run needs it once it has ended")
    with needed(output, "choose another folder with --output, or make room"):
        folder.mkdir(parents=True, exist_ok=True)
        file = file_path.open("w")
    if not is_free(file):
        file.close()
        raise UserError(
            f"--output: another process is writing to {output}; wait for it to end, or choose another folder"
        )
    return file


@contextmanager
def prepared(output: Path, settings: Mapping[str, Any], start: int, data: DataConfig) -> Iterator[FolderWriter]:
    """Make the run folder, or cut the metrics of a resumed run back to its checkpoint; ours alone in this block."""
    with lock(output) as file:
        writer = FolderWriter(output, file)
        writer.text(RESOLVED, json.dumps(settings, indent=2) + "\n")
        if digests := file_digests(data):
            writer.text(DATA, json.dumps(digests, indent=2) + "\n")
        metrics = output / METRICS
        if metrics.exists():
            lines = metrics.read_text("utf-8").splitlines(keepends=True)
            kept = list(takewhile(lambda line: line.endswith("\n") and json.loads(line)["step"] <= start, lines))
            os.truncate(metrics, len("".join(kept).encode()))  # which a full disk allows
        yield writer
        writer.close()
        shutil.rmtree(output / RANKS, ignore_errors=True)


def completed(output: Path, config: JobConfig, world_size: int) -> bool:
    """Complete the finished run of this job in a folder, if it lacks something; False: there is nothing to do.

    Raises UserError where that is not possible.
    """
    if not is_incomplete(output):
        return False
    check_same_job("--output", output, config, world_size)
    complete(output, config.tracking.mlflow_uri, lambda text: console().print(text, markup=False, soft_wrap=True))
    return True
