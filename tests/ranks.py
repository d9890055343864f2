"""Pools of real rank processes that run functions of a test together, as `deepspeed` would start them.

A pool of N processes is started once and serves many tests: a call to a pool costs milliseconds. All ranks are forked
from one process that has imported DeepSpeed, which takes seconds, and has computed nothing. Every process is one rank
of a gloo process group of its own pool, with DeepSpeed's communication initialised. What fails in a rank fails in the
test: an exception, a death, a hang.
"""

from __future__ import annotations

import contextlib
import gc
import io
import multiprocessing
import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

START_TIMEOUT = 300.0  # seconds; the very first start on a machine compiles DeepSpeed's CPU operator
GRACE = 5.0  # seconds that the other ranks get to end after one has raised
STOP_TIMEOUT = 5.0  # seconds for a rank to leave by itself before it is killed


class RankError(RuntimeError):
    """A rank failed as no exception of its own can tell: it died, hung, or raised the unpicklable."""


@dataclass(frozen=True)
class Reply:
    """What a rank sends back: `result`, or the exception and its traceback as text."""

    result: Any = None
    error: BaseException | None = None
    trace: str = ""


class RankPool:
    """`world_size` rank processes; started by the first `run`, restarted by the next one after a failure.

    `run(function, *args)` calls `function(*args)` on every rank at once and returns the results by rank.
    The function travels by reference, so it stands at the top level of an importable module (`tests...`);
    arguments and results travel by pickle. Each call starts from `torch.manual_seed(0)`.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """Results of `function(*args)` by rank; `timeout` in seconds.

        An exception is raised again here with the ranks' tracebacks as notes. Unless every rank raised, the
        ranks may be out of step afterwards, so the pool is ended. RankError tells of a dead or hanging rank;
        what others raised, as a lost connection, is in its notes.
        """
        call = pickle.dumps((function, args))
        if not self._processes or not all(process.is_alive() for process in self._processes):
            self.stop()
            self._start()
        try:
            for pipe in self._pipes:
                pipe.send_bytes(call)
            replies = self._collect(timeout)
        except BaseException:  # Ctrl-C too: no rank is left in the middle of a call
            self.stop(kill=True)
            raise
        failed = {rank: reply for rank, reply in replies.items() if reply.error is not None}
        if failed:
            if len(failed) < self.world_size:
                self.stop(kill=True)
            raise _as_raised(failed)
        return [replies[rank].result for rank in range(self.world_size)]

    def stop(self, kill: bool = False) -> None:
        """Ends the processes, if any; `kill` where they may be in the middle of a call."""
        for pipe in self._pipes:
            pipe.close()  # a rank that waits for its next call ends on this
        for process in self._processes:
            if not kill:
                process.join(STOP_TIMEOUT)
            process.kill()
        for process in self._processes:
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context, port = forking(), _free_port()
        try:
            for rank in range(self.world_size):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, rank, self.world_size, port), daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)
            replies = self._collect(START_TIMEOUT)
        except BaseException:
            self.stop(kill=True)
            raise
        failed = {rank: reply for rank, reply in replies.items() if reply.error is not None}
        if failed:
            self.stop(kill=True)
            raise _as_raised(failed)

    def _collect(self, timeout: float) -> dict[int, Reply]:
        """One reply per rank, in order of arrival; fewer if a rank raised and the others did not end soon."""
        replies: dict[int, Reply] = {}
        deadline = time.monotonic() + timeout
        raised = False
        while len(replies) < self.world_size:
            pending = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in replies}
            ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not ready and raised:
                return replies
            if not ready:
                late = ", ".join(str(rank) for rank in pending.values())
                raise RankError(f"no answer within {timeout:g} s from rank {late} of {self.world_size}")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = pending[pipe]
                try:
                    reply: Reply = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    raise _noted(self._death(rank), replies) from None
                replies[rank] = reply
                if reply.error is not None and not raised:
                    raised = True
                    deadline = min(deadline, time.monotonic() + GRACE)
        return replies

    def _death(self, rank: int) -> RankError:
        process = self._processes[rank]
        process.join(STOP_TIMEOUT)
        return RankError(f"rank {rank} of {self.world_size} died with exit code {process.exitcode}")


def forking() -> Any:
    """Starts processes that have DeepSpeed and a job's modules imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.rank_imports"])
    return context


class RankPools:
    """The pools of a test session by world size: `pools(2).run(...)`. Leaving the context ends them."""

    def __init__(self) -> None:
        self._pools: dict[int, RankPool] = {}

    def __call__(self, world_size: int) -> RankPool:
        if world_size not in self._pools:
            self._pools[world_size] = RankPool(world_size)
        return self._pools[world_size]

    def __enter__(self) -> RankPools:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for pool in self._pools.values():
            pool.stop()


def _as_raised(failed: dict[int, Reply]) -> BaseException:
    """The first exception that arrived, with every failed rank's traceback as a note."""
    error = next(iter(failed.values())).error
    assert error is not None
    return _noted(error, failed)


def _noted(error: BaseException, replies: dict[int, Reply]) -> BaseException:
    for rank, reply in replies.items():
        if reply.error is not None:
            error.add_note(f"in rank {rank}:\n{reply.trace}")
    return error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _serve(pipe: Connection, rank: int, world_size: int, port: int) -> None:
    """The life of one rank process: join the group, then answer calls until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the test process's business: it ends the pool
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    pipe.send_bytes(_answer(_join))
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            call = pipe.recv_bytes()
            pipe.send_bytes(_answer(_call, call))
            gc.collect()  # DeepSpeed does so several times an engine, over all that was ever imported:
            gc.freeze()  # what is left now is here to stay, and looked at no more


def _join() -> None:
    """Enters the process group; DeepSpeed's messages are kept off the console."""
    import torch

    from tests.rank_imports import deepspeed

    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    torch.distributed.barrier()


def _call(call: bytes) -> Any:
    import torch

    from leap_dist.zero.ranks import torch_linear_put_back

    torch.manual_seed(0)
    function, args = pickle.loads(call)
    with torch_linear_put_back():  # after stage 3 the next call would round otherwise
        return function(*args)


def _answer(function: Callable[..., Any], *args: Any) -> bytes:
    """The pickled Reply of a call: its result, or the exception that came out of it or of the pickling."""
    try:
        return pickle.dumps(Reply(result=function(*args)))
    except BaseException as error:  # SystemExit too: the test asked for the call, it gets the outcome
        return pickle.dumps(Reply(error=_portable(error), trace=traceback.format_exc()))


def _portable(error: BaseException) -> BaseException:
    """`error` if it survives pickling, else a RankError that names it."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RankError(f"{type(error).__name__}: {error}")
