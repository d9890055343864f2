"""One rank of a trial: a process that joins its peers once, and then runs its part of one trial after another.

Starting a process and importing torch, DeepSpeed and transformers takes far longer than many a trial; so ranks stay.
torch and what needs it are imported when the threads of this process are decided.
"""

from __future__ import annotations

import gc
import os
import shutil
import socket
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from leap_dist.config.sections import JobConfig
from leap_dist.console import console
from leap_dist.errors import UserError
from leap_dist.secrets import hide_secrets, remember_all
from leap_dist.train.watch import Stopped, Watch

LOCKS = ".locks"  # folder of the sweep
NUM_CHECKPOINTS = 10  # in a trial whose job does not say how often


@dataclass(frozen=True)
class Work:
    """A trial, for the ranks that run it. `output`: its folder; `asked`: whether the sweep may stop it early."""

    config: JobConfig
    output: Path
    asked: bool = False
    snapshots: dict[int, Path] = field(default_factory=dict)
    branch: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """How a trial ended. failed: by itself; stopped: early, with the metrics that it had then."""

    kind: Literal["done", "failed", "stopped"]
    seconds: float = 0.0
    error: str = ""
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class State:
    """What a running trial shows. metrics: those with which it waits at a rung for a verdict, after so many seconds."""

    step: int = 0
    total: int = 0
    rung: int = 0
    metrics: dict[str, float] | None = None
    seconds: float = 0.0


class Rank:
    """The process. `run` may take hours; meanwhile `state` and `decide` answer from other threads."""

    def __init__(self, cpus: float, gpus: int) -> None:
        threads = str(max(1, int(cpus)))
        os.environ.update(OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads, DO_NOT_TRACK="true")
        if not gpus:
            os.environ["DS_ACCELERATOR"] = "cpu"
        self._threads, self._began = int(threads), 0.0
        self._state, self._verdict, self._answered = State(), True, threading.Event()

    def open_store(self) -> tuple[str, int]:
        """Let the ranks find each other here. The store takes its port itself, so that no two ever collide."""
        from ray.util import get_node_ip_address
        from torch.distributed import TCPStore

        host = get_node_ip_address()
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return host, self._store.port

    def join(self, folder: Path, rank: int = 0, world_size: int = 1, host: str | None = None, port: int = 0) -> None:
        """Join the process group at a store; without one this process is the only rank.

        Ray shows a rank its own GPUs alone, so it takes the first one it sees. folder: where paths of the job file
        start from. Raises UserError if it is not there.
        """
        if not folder.is_dir():
            raise UserError(f"{socket.gethostname()} has no folder {folder}: a sweep needs one that all nodes share")
        os.chdir(folder)
        if host is not None:
            place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": 0, "MASTER_ADDR": host, "MASTER_PORT": port}
            os.environ.update({key: str(value) for key, value in place.items()}, TORCHELASTIC_USE_AGENT_STORE="True")
        from leap_dist.zero.ranks import start_ranks

        self._ranks = start_ranks()

    def run(self, work: Work) -> Outcome:
        """This rank's part of a trial; what goes wrong with it is in the outcome.

        Raises ConnectionError where another rank is gone: the trial can resume from its last checkpoint.
        """
        from leap_dist.zero.ranks import peer_is_gone

        self._began = time.monotonic()
        self._state, self._verdict = State(), True
        remember_all(work.config.model_dump())  # what it holds may be quoted by an error, and stays in this process
        try:
            with _alone(work.output) if self._ranks.first else nullcontext():
                self._run(work)
            outcome = Outcome("done", time.monotonic() - self._began)
        except Stopped as stopped:
            outcome = Outcome("stopped", time.monotonic() - self._began, metrics=stopped.metrics)
        except UserError as error:
            outcome = Outcome("failed", time.monotonic() - self._began, str(error))
        except Exception as error:
            if peer_is_gone(error):
                raise ConnectionError("another rank is gone") from None
            outcome = Outcome("failed", time.monotonic() - self._began, _last_words(error))
            with suppress(OSError):  # a full disk: the last words are in the outcome
                _log(work.output).write_text(hide_secrets(traceback.format_exc()), encoding="utf-8")
        gc.collect()
        return outcome

    def state(self) -> State:
        """How far the trial is."""
        return self._state

    def decide(self, verdict: bool) -> None:
        """The sweep's verdict on the metrics that `state` shows."""
        self._verdict = verdict
        self._answered.set()

    def _run(self, work: Work) -> None:
        import torch

        from leap_dist.run_folder import REFERENCE
        from leap_dist.train.loop import run_job

        torch.set_num_threads(self._threads)  # counts for the thread that says it
        how = self._ranks.on_first(lambda: _prepare(work))
        if how == "finished":
            return
        may_go_on, shared = self._ask if work.asked else None, work.output.parent / REFERENCE
        watch = Watch(self._notify, may_go_on, NUM_CHECKPOINTS, work.snapshots, shared)
        run_job(work.config, work.output, how == "resume", self._ranks, watch)

    def _notify(self, step: int, total: int, measures: Mapping[str, float]) -> None:
        self._state = State(step, total)

    def _ask(self, rung: int, metrics: Mapping[str, float]) -> bool:
        step, total = self._state.step, self._state.total
        self._answered.clear()
        self._state = State(step, total, rung, dict(metrics), time.monotonic() - self._began)
        self._answered.wait()
        self._state = State(step, total)
        return self._verdict


def _prepare(work: Work) -> Literal["finished", "resume", "new"]:
    """Look at what an earlier try has left, and make the folder ready."""
    from leap_dist.checkpoint.folders import latest_checkpoint
    from leap_dist.run_folder import CERTIFICATE, CHECKPOINTS
    from leap_dist.sweep.ladder import branch_off
    from leap_dist.tracking.completion import complete_trial

    _log(work.output).unlink(missing_ok=True)
    if (work.output / CERTIFICATE).is_file():
        complete_trial(work.output, work.config.tracking.mlflow_uri, _tell)
        return "finished"
    if latest_checkpoint(work.output / CHECKPOINTS) is not None:
        return "resume"
    shutil.rmtree(work.output, ignore_errors=True)
    if work.branch is None:
        return "new"
    branch_off(work.branch, work.output, work.config)
    return "resume"


def _tell(text: str) -> None:
    console().print(text, markup=False, soft_wrap=True)


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Wait until no rank of a sweep that was cut off writes to the folder any more; its end frees the lock."""
    import fcntl

    locks = output.parent / LOCKS
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / output.name).open("w") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _last_words(error: Exception) -> str:
    """The first line of an error, without secrets: they are hidden before it is cut, which would leave a part."""
    text: list[Any] = hide_secrets(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no more words'}"[:300]


def _log(output: Path) -> Path:
    """Where the traceback of a failed trial is, beside its folder."""
    return output.with_name(f"{output.name}.log")
