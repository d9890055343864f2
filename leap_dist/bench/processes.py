"""Rank processes of a benchmark: started for one function, joined in one group, ended."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.multiprocessing

from leap_dist.errors import UserError
from leap_dist.machine import changed_environment
from leap_dist.zero.ranks import leave, start_ranks

T = TypeVar("T")


def on_ranks(num_ranks: int, function: Callable[..., T], *args: Any) -> list[T]:
    """`function(*args)` in as many fresh processes, the ranks of one group; what it returns, by rank.

    Several ranks have one thread each, one rank has as many as the environment gives it. The function travels by
    reference. Raises a rank's UserError again, and a RuntimeError with the traceback for anything else.
    """
    with tempfile.TemporaryDirectory() as folder, _environment(num_ranks):
        call = (num_ranks, Path(folder), function, args)
        torch.multiprocessing.start_processes(_rank, args=call, nprocs=num_ranks, start_method="spawn")
        outcomes = [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(num_ranks)]
    if refused := [outcome for outcome in outcomes if isinstance(outcome, UserError)]:
        raise refused[0]
    return outcomes


def _rank(rank: int, num_ranks: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """The life of one rank."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # torch sends it where the parent dies; under nohup it is ignored
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    if num_ranks > 1:
        torch.set_num_threads(1)
    start_ranks()
    try:
        outcome = function(*args)
    except UserError as error:
        outcome = error
    (folder / str(rank)).write_bytes(pickle.dumps(outcome))
    leave(0)


@contextmanager
def _environment(num_ranks: int) -> Iterator[None]:
    """What the ranks inherit: where they meet, and how many threads each has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1"}
    own = {"OMP_NUM_THREADS": "1"} if num_ranks > 1 else {}
    if not torch.accelerator.is_available():
        own["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would look for others, and warn
    with changed_environment({**world, "MASTER_PORT": str(port), **own}):
        yield


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """What libraries and rank processes print goes to stderr, so that stdout holds the report alone."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)
