"""Run a study: python launch/study.py configs/studies/clock.json [--output DIR] [--workers N]

Exit codes: 0 done; 1 a run failed, or a fault; 2 a mistake in the study file or the command line.
"""

import argparse
import sys
from pathlib import Path

from leap_dist.cli import parsed
from leap_dist.errors import UserError
from leap_dist.files import user_path


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Run every combination of a study's settings, and show the results.",
        epilog="Exit codes: 0 done; 1 a run failed, or a fault; 2 a mistake in the study file or the command line.",
    )
    parser.add_argument("study", type=user_path, metavar="STUDY", help="a study file")
    where = "folder for the runs (default: outputs/<study name>)"
    parser.add_argument("--output", type=user_path, metavar="DIR", help=where)
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    return parsed(parser)


def main() -> int:
    """Parse, run, report; the exit code."""
    arguments = parse_arguments()
    try:
        from leap_dist.console import console, summary_table
        from leap_dist.files import warn_if_unwritten
        from leap_dist.sweep.grid import expand
        from leap_dist.sweep.study import read_study, run_study, summarize, table_lines, write_pictures

        if arguments.workers < 1:
            raise UserError(f"--workers: got {arguments.workers}; allowed: an integer >= 1")
        study = read_study(arguments.study)
        output = arguments.output or Path("outputs") / arguments.study.stem
        script = Path(__file__).resolve().with_name("prune.py")
        say = lambda text: console().print(text, markup=False, soft_wrap=True)  # noqa: E731
        cells = run_study(study, output, script, arguments.workers, say)
        if cells:
            points = summarize(cells, study.metric)
            summary_table(table_lines(points), title=f"{arguments.study.stem}: {study.metric or 'the main metric'}")
            with warn_if_unwritten(output / "report.html", say):
                say(f"pictures and page: {', '.join(map(str, write_pictures(cells, points, study.metric, output)))}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if len(cells) == len(expand(study.vary)) else 1


if __name__ == "__main__":
    sys.exit(main())
