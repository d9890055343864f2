"""Run many jobs: python launch/sweep.py --config configs/sweep_ratios.json [--address auto] [--output DIR]

Exit codes: 0 all trials are done, or the budget is used up; 1 a trial failed, or a fault of ours; 2 a mistake in the
sweep file or the call; 3 stopped by Ctrl-C, SIGTERM or SIGUSR1: the same command resumes it.
"""

import argparse
import sys

from leap_dist.cli import parsed
from leap_dist.errors import UserError
from leap_dist.files import user_path

EXIT_CODES = (
    "Exit codes: 0 done; 1 a trial failed, or a fault; 2 a mistake in the file or the call; 3 stopped by Ctrl-C, "
    "SIGTERM or SIGUSR1."
)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Run a job with some keys varied, as trials: a table, a Pareto front, a picture.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--config", type=user_path, required=True, metavar="SWEEP", help="a sweep file")
    parser.add_argument(
        "--address", help='"auto", host:port or ray://host:port of a Ray cluster (default: Ray on this machine alone)'
    )
    parser.add_argument("--output", metavar="DIR", help="a folder, or a URI for fsspec (default: outputs/<name>)")
    parser.add_argument("--resume", action="store_true", help="resume a sweep; an error if there is none")
    parser.add_argument("--budget", metavar="KEY=N", help="end after trials=N, hours=N or gpu_hours=N")
    return parsed(parser)


def main() -> int:
    """Parse, run, report; the exit code."""
    arguments = parse_arguments()
    try:
        from leap_dist.sweep.run import run_sweep
        from leap_dist.sweep.stop import heed_signals

        heed_signals()
        results = run_sweep(arguments.config, arguments.output, arguments.address, arguments.resume, arguments.budget)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command resumes it", file=sys.stderr)
        return 3
    return 1 if any(result.outcome == "failed" for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
