"""Compare finished runs that MLflow has recorded: python launch/compare.py [--experiment NAME] [--pareto] ...
Send what a run could not, as MLflow was down: python launch/compare.py --sync OUTPUT_FOLDER

Exit codes: 0 done; 1 no run satisfies --best, or a fault; 2 a mistake in the command line.
"""

import argparse
import sys
from os.path import expanduser

from leap_dist.cli import parsed
from leap_dist.errors import UserError, printable
from leap_dist.files import user_path

UNSAID: tuple[object, ...] = (None, False, [])
GO_WITH = {"sync": ("uri",), "diff": ("uri", "experiment", "sweep", "tag", "csv", "json")}
"""What each of these options can be combined with: they make no use of the others."""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Compare finished runs, side by side; without a selection all runs of the store.",
        epilog="Exit codes: 0 done; 1 no run satisfies --best, or a fault; 2 a mistake in the command line.",
    )
    add = parser.add_argument
    add("--uri", help="the MLflow store (default: $MLFLOW_TRACKING_URI or sqlite:///mlflow.db; with --sync the run's)")
    add("--experiment", action="append", default=[], metavar="NAME", help="runs of an experiment; can be repeated")
    add("--sweep", metavar="PARENT_RUN_ID", help="the trials of a sweep")
    add("--tag", action="append", default=[], metavar="KEY=VALUE", help='such as "leap.rule=movement"; can be repeated')
    add(
        "--runs", nargs="+", action="extend", default=[], metavar="ID", help="runs by id, the beginning of one, or name"
    )
    add("--metric", metavar="NAME", help="metric to compare, such as accuracy (default: the first that all runs have)")
    add("--pareto", action="store_true", help="only runs on the Pareto front of density and metric")
    add("--best", metavar="CONDITION", help='the smallest run that satisfies it, such as "accuracy>=0.9"')
    add("--register", metavar="NAME[@ALIAS]", help="make the run that --best finds a version of a registered model")
    add("--move", action="store_true", help="with --register: an alias that another version has moves to this one")
    add("--masks", action="store_true", help="overlap (IoU) of the runs' masks, read from their folders")
    add("--diff", nargs=2, metavar=("A", "B"), help="only the parameters in which two runs differ")
    add("--plot", type=user_path, metavar="FILE", help="picture of the metric over density, .png or .svg")
    add("--report", type=user_path, metavar="FILE", help="page of these runs with their pictures, .html")
    add("--csv", type=user_path, metavar="FILE", help="the table as CSV")
    add("--json", type=expanduser, metavar="FILE", help="the table as JSON; - prints it alone to standard output")
    add("--sync", type=user_path, metavar="FOLDER", help="only send the records that this run could not send")
    arguments = parsed(parser)
    for only, also in GO_WITH.items():
        if getattr(arguments, only) is not None:
            others = [name for name in vars(arguments) if name != only and getattr(arguments, name) not in UNSAID]
            if ignored := [f"--{name}" for name in others if name not in also]:
                may = ", ".join(f"--{name}" for name in also)
                parser.error(f"--{only} cannot be combined with {', '.join(ignored)}; allowed: {may}")
    return arguments


def compare(arguments: argparse.Namespace) -> int:
    """Read, show and write what was asked for; the exit code."""
    from leap_dist.config.section import with_home
    from leap_dist.config.sections import default_store
    from leap_dist.console import summary_table
    from leap_dist.tracking import compare as c
    from leap_dist.tracking.registering import register_best
    from leap_dist.tracking.runs import Selection, read_runs

    request = c.Request(
        arguments.metric,
        arguments.best,
        arguments.pareto,
        arguments.masks,
        arguments.plot,
        arguments.report,
        arguments.register,
        arguments.move,
    )
    named = arguments.diff or arguments.runs
    uri = default_store() if arguments.uri is None else str(with_home(arguments.uri))
    runs = read_runs(uri, Selection(arguments.experiment, arguments.sweep, arguments.tag, named))
    answer = c.differences(*runs) if arguments.diff else c.compare(runs, request, all_named=bool(named))
    for note in answer.notes:
        print(printable(note), file=sys.stderr)
    if arguments.json != "-":
        for title, lines in answer.tables.items():
            summary_table(lines, title=title)
    c.write(answer, arguments.json, arguments.csv)
    if request.place and answer.found:
        print(printable(register_best(uri, answer.found, request.place, request.move)), file=sys.stderr)
    return 1 if arguments.best and not answer.records else 0


def main() -> int:
    """Parse, compare; the exit code."""
    arguments = parse_arguments()
    try:
        if arguments.sync is not None:
            from leap_dist.config.section import with_home
            from leap_dist.tracking.mlflow import sync

            print(printable(sync(arguments.sync, with_home(arguments.uri))))
            return 0
        return compare(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
