"""The ranks of a job: start them, agree on outcomes, sum and gather small things."""

import atexit
import contextlib
import io
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from leap_dist.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of the job."""

    rank: int
    world_size: int
    device: torch.device

    @staticmethod
    def here() -> "Ranks":
        """This process among the ranks that are running; alone where none are."""
        from deepspeed.accelerator import get_accelerator

        device = torch.device(get_accelerator().current_device_name())
        running = dist.is_initialized()
        return Ranks(dist.get_rank() if running else 0, dist.get_world_size() if running else 1, device)

    @property
    def first(self) -> bool:
        """True on rank 0, the one that writes and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def on_first(self, action: Callable[[], T]) -> T:
        """What `action` returns on rank 0, for every rank; a UserError there is raised on all of them."""
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = action()
            except UserError as error:
                outcome[1] = str(error)
        if self.world_size > 1:
            dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise UserError(outcome[1])
        result: T = outcome[0]
        return result

    def first_then_rest(self, action: Callable[[], T]) -> T:
        """`action` on rank 0, then on the others, which find its caches filled; each raises for itself."""
        if self.first:
            try:
                return action()
            finally:
                self.barrier()
        self.barrier()
        return action()

    def mean(self, values: Tensor) -> Tensor:
        """The mean over ranks of a small tensor."""
        values = values.detach().to(self.device)
        if self.world_size > 1:
            dist.all_reduce(values)
        return values / self.world_size

    def largest(self, values: Tensor) -> Tensor:
        """The largest over ranks of each value of a small tensor."""
        values = values.to(self.device)
        if self.world_size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of every rank, in rank order, on the CPU; all have one shape."""
        if self.world_size == 1:
            return [tensor.cpu()]
        staged = tensor.contiguous().to(self.device)
        parts = [torch.empty_like(staged) for _ in range(self.world_size)]
        dist.all_gather(parts, staged)
        return [part.cpu() for part in parts]

    def gather_objects(self, value: T) -> list[T]:
        """A small value of every rank, in rank order."""
        found: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(found, value)
        return found


def start_ranks(minutes: float = 30.0) -> Ranks:
    """Join the ranks that a launcher started; without a launcher this process is the only rank.

    minutes: what the ranks may take to find each other, and a collective before it fails. Raises UserError where they
    cannot meet.
    """
    join_alone()
    binaries = os.path.dirname(sys.executable)  # DeepSpeed builds a small extension once, with ninja
    if binaries not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([binaries, os.environ.get("PATH", "")])
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # DeepSpeed's to heed
    with contextlib.redirect_stdout(io.StringIO()):  # every rank would say that the extension is built
        _meet(timeout=timedelta(minutes=minutes))
    return Ranks.here()


def join_ranks(port: int, required: bool | None) -> None:
    """The same for a loop of the user's own, with what `deepspeed.initialize` takes; nothing where ranks are running.

    Raises UserError where they cannot meet.
    """
    join_alone()
    from deepspeed.accelerator import get_accelerator

    with errors_only():
        _meet(distributed_port=port, dist_init_required=required)
    if get_accelerator().device_name() != "cpu" and "LOCAL_RANK" in os.environ:
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))


def _meet(**options: Any) -> None:
    """DeepSpeed's init_distributed; what keeps ranks from finding each other is one message."""
    import deepspeed

    try:
        deepspeed.init_distributed(verbose=False, **options)
    except (dist.DistError, RuntimeError, ValueError, OSError, KeyError, AssertionError) as error:
        address, port = (os.environ.get(name, "missing") for name in ("MASTER_ADDR", "MASTER_PORT"))
        place = f"rank {os.environ.get('RANK', '?')} of {os.environ.get('WORLD_SIZE', '?')} at {address}:{port}"
        words = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"the ranks cannot meet ({place}): {words}; {_way_out(str(error))}") from error


def _way_out(words: str) -> str:
    if "EADDRINUSE" in words or "address already in use" in words.lower():
        return "another process has this port: end it, or choose another one with --master_port (MASTER_PORT)"
    if "timed out" in words.lower() or "timeout" in words.lower():
        return (
            "check that all of them were started and reach this address; they wait for as long as "
            "train.collective_timeout says"
        )
    return "check the launcher's address, port and number of ranks"


def several() -> bool:
    """Whether other ranks are running with this one, or will be: a launcher says so."""
    started = os.environ.get("WORLD_SIZE", "1")
    return (dist.is_initialized() and dist.get_world_size() > 1) or (started.isdecimal() and int(started) > 1)


def join_alone() -> None:
    """Where no launcher has set this process's place, and nothing is running yet, it is the only rank."""
    if "RANK" not in os.environ and not dist.is_initialized():
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(_free_port()))


def peer_is_gone(error: Exception) -> bool:
    """Whether an error means another rank's end: what torch raises where a connection breaks, or is silent."""
    broken = ("gloo", "connection closed", "connection reset", "broken pipe", "connection refused")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in broken)


SHORT = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory")


def is_short_of_memory(error: BaseException) -> bool:
    """Whether an error of torch's or Python's says that memory was not enough."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in SHORT)


@contextlib.contextmanager
def errors_only() -> Iterator[None]:
    """DeepSpeed logs errors alone."""
    import deepspeed

    level = deepspeed.utils.logger.level
    deepspeed.utils.logger.setLevel("ERROR")
    try:
        yield
    finally:
        deepspeed.utils.logger.setLevel(level)


@contextlib.contextmanager
def torch_linear_put_back() -> Iterator[None]:
    """Undo what DeepSpeed does to a process under stage 3: its own nn.functional.linear, which rounds otherwise."""
    linear = torch.nn.functional.linear
    try:
        yield
    finally:
        torch.nn.functional.linear = linear


def leave(code: int) -> NoReturn:
    """End this process, exit handlers included, without taking the interpreter apart.

    A communication thread that lets go of its last tensor while Python finalizes aborts a rank whose work is done.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a full disk, a pipe that nobody reads any more
            stream.flush()
    os._exit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
