"""Prune one model: deepspeed launch/prune.py --config ds_leap.json [--set leap.target=0.05] [--output DIR] [--resume]
What it takes: python launch/prune.py --config ds_leap.json --plan 64

Exit codes: 0 done; 2 a mistake in the config, the data or the call; 1 a fault of ours.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from leap_dist.errors import UserError

PATIENCE = 10.0
"""Seconds that other ranks leave the first one to tell of a mistake. The launcher ends every rank as soon as one has
ended, so a rank that is still there has seen what the first one did not, and tells it itself."""


def parse_arguments() -> argparse.Namespace:
    """The command line; --local_rank is added by DeepSpeed's launcher."""
    parser = argparse.ArgumentParser(
        description="Prune a transformer while it trains, to an exact density.",
        epilog="Exit codes: 0 done; 2 a mistake in the config, the data or the call; 1 a fault of ours.",
    )
    parser.add_argument("--config", required=True, help="job file, or the name of one in configs/")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a dotted key; repeatable"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="run folder (default: outputs/<config name>)")
    parser.add_argument("--resume", action="store_true", help="go on from the run folder's last checkpoint")
    parser.add_argument(
        "--plan",
        type=int,
        nargs="?",
        const=int(os.environ.get("WORLD_SIZE", 1)),
        metavar="N",
        help="print what the job takes on N ranks, of memory and of the network, and end",
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Parse, run, report; the exit code."""
    arguments = parse_arguments()
    first = os.environ.get("RANK", "0") == "0"
    try:
        from leap_dist.job_file import load_job

        config = load_job(arguments.config, arguments.set)
        if arguments.plan is not None:
            from leap_dist.bench.forecast import forecast, print_forecast

            if first:
                print_forecast(forecast(config, arguments.plan))
            return 0
        from leap_dist.train.loop import run_job
        from leap_dist.zero.ranks import leave, start_ranks

        output = arguments.output or Path("outputs") / Path(arguments.config).stem
        try:
            run_job(config, output, arguments.resume, start_ranks())
        except UserError as error:
            leave(complain(error, first))
        leave(0)
    except UserError as error:
        return complain(error, first)


def complain(error: UserError, first: bool) -> int:
    """Tell of a mistake, on rank 0 first; the exit code."""
    if not first:
        time.sleep(PATIENCE)
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
