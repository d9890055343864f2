"""Benchmarks: python launch/bench.py overhead [--model FOLDER] | select | scale | inference RUN | latency --config JOB

Each takes --json.
"""

import argparse
import json
import sys
from typing import Any

from leap_dist.cli import check_threads, parsed
from leap_dist.errors import UserError
from leap_dist.files import user_path

CODES = "Exit codes: 0 done; 2 a mistake in the command line, or no finished run in the folder; 1 a fault."


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Run a benchmark. A wrong result is not reported.", epilog=CODES)
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    overhead = commands.add_parser("overhead", help="a training step: dense, pruned, and masks in the forward pass")
    overhead.add_argument("--model", metavar="FOLDER", help="folder or hub id of a model (default: a tiny one)")
    for name, default, text in (
        ("batch", 32, "sentences in a batch of a rank"),
        ("length", 64, "tokens of a sentence"),
        ("stage", 2, "ZeRO stage"),
        ("ranks", 1, "processes; several have one thread each"),
        ("steps", 9, "timed steps of each variant"),
    ):
        overhead.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    commands.add_parser("select", help="an exact selection: ours compared with sort, topk and kthvalue")
    commands.add_parser("scale", help="bytes held and sent, by number of ranks and parameters")
    inference = commands.add_parser("inference", help="a run's model: dense, masked and shrunk; torch and onnxruntime")
    inference.add_argument("run", type=user_path, metavar="RUN", help="folder of a finished run of launch/prune.py")
    inference.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N", help="default: 1 2")
    latency = commands.add_parser("latency", help='the table that a job with leap.measure "latency" names')
    latency.add_argument("--config", required=True, metavar="JOB", help="the job; its latency_table is written")
    latency.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides a key of the job")
    latency.add_argument("--threads", type=int, default=1, metavar="N", help="default: 1")
    for name, command in commands.choices.items():
        command.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
        command.set_defaults(command=name)
    return parsed(parser)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmark that was asked for."""
    options = {key: value for key, value in vars(arguments).items() if key not in ("command", "json")}
    if arguments.command == "overhead":
        from leap_dist.bench import overhead

        return overhead.bench_overhead(overhead.Setting(**options))
    if arguments.command == "select":
        from leap_dist.bench import select

        return select.bench_select()
    if arguments.command == "scale":
        from leap_dist.bench import scale

        return scale.bench_scale()
    if arguments.command == "latency":
        from leap_dist.bench.latency import bench_latency
        from leap_dist.config.job_file import load_job

        check_threads(arguments.threads)
        return bench_latency(load_job(arguments.config, arguments.set), arguments.threads)
    from leap_dist.export import inference
    from leap_dist.run_folder import read_run

    check_threads(*arguments.threads)
    return inference.bench_inference(read_run(arguments.run), arguments.threads)


def main() -> int:
    """Parse, measure, report; the exit code."""
    arguments = parse_arguments()
    try:
        from leap_dist.bench.printing import print_result
        from leap_dist.bench.processes import stdout_to_stderr

        with stdout_to_stderr():
            result = measure(arguments)
        print(json.dumps(result, indent=2)) if arguments.json else print_result(result)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
