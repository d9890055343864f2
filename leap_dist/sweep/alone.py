"""A sweep where Ray is not installed: its trials one after another in this process, by the same code as on Ray."""

from __future__ import annotations

from pathlib import Path

from leap_dist.errors import UserError
from leap_dist.sweep.line import Line
from leap_dist.sweep.rank import Rank
from leap_dist.sweep.sweep_file import SweepConfig

INSTALL = 'needs Ray; pip install -e ".[sweep]"'


def check_alone(sweep: SweepConfig, address: str | None) -> None:
    """Raises UserError for what only Ray can do."""
    if address is not None:
        raise UserError(f'--address: got "{address}", which {INSTALL}, or leave it out')
    if sweep.ranks > 1 or sweep.resources.gpus > 1:
        raise UserError(f"ranks: got {sweep.ranks}, each with {sweep.resources.gpus} GPUs; more than one {INSTALL}")
    if sweep.early_stop:
        raise UserError(f'early_stop: got "{sweep.early_stop}", which {INSTALL}, or set null')


def run_alone(line: Line, parent: str | None) -> None:
    """As `run_on_ray`."""
    line.board.tell(f"{line.about}, one after another: Ray is not installed")
    rank = Rank(line.sweep.resources.cpus, line.sweep.resources.gpus)
    rank.join(Path.cwd())
    while (work := line.take(parent)) is not None:
        line.end(work.output.name, rank.run(work))
