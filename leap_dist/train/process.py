"""A job as a process of its own: signals, faults, and the exit code that says how it ended."""

from __future__ import annotations

import sys
from pathlib import Path

from leap_dist.config.sections import JobConfig
from leap_dist.errors import UserError
from leap_dist.stopping import STOPPED
from leap_dist.train.guards import memory_advice
from leap_dist.train.loop import run_job
from leap_dist.train.signals import Interrupted, Signals
from leap_dist.train.watch import Watch
from leap_dist.zero.ranks import is_short_of_memory, peer_is_gone, start_ranks


def run_process(config: JobConfig, output: Path, resume: bool) -> int:
    """Run a job in this process, one of the job's ranks; the exit code. Raises UserError for the user's mistakes."""
    with Signals() as signals:
        with signals.at_once():
            ranks = start_ranks(config.train.collective_timeout)
        try:
            run_job(config, output, resume, ranks, Watch(asked=lambda: signals.asked))
        except Interrupted as stopped:
            if ranks.first:
                print(stopped, flush=True)
            return STOPPED
        except UserError:
            raise
        except Exception as error:
            if is_short_of_memory(error):
                raise UserError(memory_advice(config, error)) from error
            if ranks.world_size > 1 and peer_is_gone(error):
                print(
                    f"error: rank {ranks.rank} has lost another rank ({str(error).splitlines()[0]}); start the job "
                    "again: it resumes from its last checkpoint",
                    file=sys.stderr,
                )
                return 1
            raise
    return 0
