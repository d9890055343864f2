"""Prune one model: deepspeed launch/prune.py --config ds_leap.json [--set leap.target=0.05] [--output DIR] [--resume]
What it needs: python launch/prune.py --config ds_leap.json --plan 64
From an old config: python launch/prune.py --import-compression old_ds_config.json [--output new_job.json]

SIGTERM, SIGINT and SIGUSR1: the step in progress is finished, and a checkpoint saved; the same command resumes from it.
Exit codes: 0 done; 1 a fault; 2 a mistake in the config, the data or the command line; 3 stopped by a signal.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from leap_dist.cli import parsed
from leap_dist.errors import UserError
from leap_dist.files import user_path

PATIENCE = 10.0  # seconds that other ranks leave the first one to report a mistake


def parse_arguments() -> argparse.Namespace:
    """The command line; --local_rank is added by DeepSpeed's launcher."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", help="job file, or the name of one in configs/")
    source.add_argument("--import-compression", type=user_path, metavar="FILE", help="make a job file of an old config")
    add = parser.add_argument
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key; can be repeated")
    add("--output", type=user_path, help="run folder (default: outputs/<config name>), or the new job file")
    add("--resume", action="store_true", help="resume the run in the folder; an error if there is none")
    world = int(os.environ.get("WORLD_SIZE", 1))
    add("--plan", type=int, nargs="?", const=world, metavar="N", help="print what the job needs on N ranks, and exit")
    add("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parsed(parser)
    if arguments.import_compression and (arguments.set or arguments.resume or arguments.plan is not None):
        parser.error("--import-compression can be combined with --output only")
    if arguments.plan is not None and (arguments.output or arguments.resume):
        parser.error("--plan starts no run: it can be combined with --config and --set only")
    return arguments


def main() -> int:
    """Parse, run, report; the exit code."""
    arguments = parse_arguments()
    first = os.environ.get("RANK", "0") == "0"
    try:
        if arguments.import_compression:
            from leap_dist.config.migrate import import_file

            return import_file(arguments.import_compression, arguments.output) if first else 0
        from leap_dist.config.job_file import load_job

        config = load_job(source := arguments.config, arguments.set)
        if arguments.plan is not None:
            from leap_dist.bench.forecast import forecast, print_forecast

            if first:
                print_forecast(forecast(config, arguments.plan))
            return 0
        from leap_dist.train.process import run_process
        from leap_dist.zero.ranks import leave

        try:
            code = run_process(config, arguments.output or default_output(source), arguments.resume)
        except UserError as error:
            code = complain(error, first)
        leave(code)
    except UserError as error:
        return complain(error, first)


def default_output(source: str) -> Path:
    """outputs/ and the name of the config, which may have dots and may lack its .json."""
    return Path("outputs", Path(source).name.removesuffix(".json"))


def complain(error: UserError, first: bool) -> int:
    """Report a mistake, on rank 0 first; the exit code."""
    if not first:
        time.sleep(PATIENCE)  # the launcher ends all ranks with the first: one that is left saw what that one did not
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
