"""What keeps a run from going wrong unnoticed: values that are no numbers, silent ranks, memory that is short."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from leap_dist.config.sections import JobConfig
from leap_dist.zero.ranks import Ranks

# ---------------------------------------------------------------------------------------------- values


def spoiled(loss: Tensor) -> Tensor:
    """The loss, bit for bit; if it is not finite, so is no gradient of it: then no rank takes the step.

    Nothing is communicated and nothing waits for the device: that the gradient is not finite comes out where its
    norm is summed over the ranks.
    """
    return loss * (loss.detach() * 0.0 + 1.0)


class BadSteps:
    """Counts steps whose update was left out because the loss or the gradient was not finite, on every rank alike.

    DeepSpeed leaves them out under ZeRO 1 to 3, LeapAdamW itself under stage 0. A gradient whose squares have a finite
    sum makes finite scores and thresholds. fp16's search for a loss scale also leaves steps out; there those
    count whose loss was not finite, and those at a scale that cannot fall any more.
    """

    def __init__(self, engine: Any, limit: int, total: int = 0) -> None:
        self._engine, self._limit = engine, limit
        self.total, self.in_a_row = total, 0
        self._left_out = engine.leap.num_left_out
        self._scaler: Any = getattr(getattr(engine, "optimizer", None), "loss_scaler", None)
        if self._scaler is not None and hasattr(self._scaler, "raise_error_at_min_scale"):
            self._scaler.raise_error_at_min_scale = False  # DeepSpeed's own end, a traceback

    def after(self, loss: Tensor) -> bool:
        """Look at a step, with its loss on this rank; whether `limit` of them in a row were left out."""
        before, self._left_out = self._left_out, self._engine.leap.num_left_out
        if self._left_out == before:
            self.in_a_row = 0
        elif not self._engine.fp16_enabled() or self._is_at_lowest_scale() or self._is_spoiled_anywhere(loss):
            self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        return self.in_a_row >= self._limit

    def _is_at_lowest_scale(self) -> bool:
        scaler = self._scaler
        return scaler is not None and scaler.cur_scale <= getattr(scaler, "min_scale", scaler.cur_scale)

    def _is_spoiled_anywhere(self, loss: Tensor) -> bool:
        """Whether the loss of a rank is not finite. Collective: all ranks leave the same steps out."""
        return bool(Ranks.here().largest((~torch.isfinite(loss)).float().reshape(1)))

    def message(self, done: int, checkpoint: Path | None) -> str:
        """What a user has to know of a run that ends here; `checkpoint`: the last one, which is of before."""
        good = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint was written"
        return (
            f"train: the loss or the gradient was not finite in {self.in_a_row} steps in a row, up to step {done}, and "
            f"their updates were left out; lower train.learning_rate, or look at the data; {good}"
        )


# ---------------------------------------------------------------------------------------------- memory


def memory_advice(config: JobConfig, error: BaseException) -> str:
    """What a user can change in a job that memory was too short for."""
    deepspeed = config.deepspeed
    zero = deepspeed.get("zero_optimization", {})
    stage, micro = zero.get("stage", 0), deepspeed["train_micro_batch_size_per_gpu"]
    ways = []
    if micro > 1:
        accumulated = deepspeed.get("gradient_accumulation_steps", 1)
        ways.append(
            f"lower train_micro_batch_size_per_gpu, now {micro}, and raise gradient_accumulation_steps, now "
            f"{accumulated}, by the same factor: the run stays the same"
        )
    if stage < 3:
        ways.append(f"raise zero_optimization.stage, now {stage}: ranks share more of the state")
    if "offload_optimizer" not in zero:
        ways.append('set zero_optimization.offload_optimizer to {"device": "cpu"}')
    ways.append(f"lower data.max_length, now {config.data.max_length}")
    why = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return "\n  ".join([f"not enough memory: {why[:200]}; what helps:", *ways])


# ---------------------------------------------------------------------------------------------- ranks


class Heartbeats:
    """A context in which ranks show each other that they live, and end where one has been silent for too long.

    A thread of each rank writes a small file in `folder`, whatever the rank is doing; a rank that was stopped, or whose
    machine is gone, writes no more. The others, which wait for it in a collective, then say which one it is, and
    end with code 1.
    """

    def __init__(self, folder: Path, ranks: Ranks, minutes: float) -> None:
        self._folder, self._ranks, self._limit = folder, ranks, 60.0 * minutes
        self._over = threading.Event()
        self._since = 0.0  # a file that is older is of a run before, which was killed
        self.step = 0

    def __enter__(self) -> Heartbeats:
        if self._ranks.world_size > 1:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._write()
            self._since = self._file(self._ranks.rank).stat().st_mtime
            self._thread = threading.Thread(target=self._beat, name="heartbeats", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ranks.world_size > 1:
            self._over.set()
            self._thread.join()
            self._file(self._ranks.rank).unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._over.wait(self._limit / 4):
            try:
                os.utime(self._file(self._ranks.rank))  # takes no room on a full disk
                silent = self.silent()
            except OSError:  # the folder is gone, and the run says so
                continue
            if silent:
                who = ", ".join(f"rank {rank} ({where})" for rank, where in silent.items())
                print(
                    f"error: no sign of life for {self._limit / 60.0:.3g} minutes from {who}; the other ranks wait for "
                    f"it after step {self.step}; end what is left of it and start the job again: it resumes from its "
                    "last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)

    def silent(self) -> dict[int, str]:
        """The ranks without a sign of life for too long, and where they run; by the clock of the file system."""
        now = self._file(self._ranks.rank).stat().st_mtime
        found = {}
        for rank in range(self._ranks.world_size):
            file = self._file(rank)
            try:
                if now - max(file.stat().st_mtime, self._since) > self._limit:
                    found[rank] = file.read_text("utf-8")
            except FileNotFoundError:  # that rank is done
                continue
        return found

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # a full disk: the others see no file of this rank, and ask for no sign
            self._file(self._ranks.rank).write_text(f"process {os.getpid()} on {socket.gethostname()}", "utf-8")

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}"
