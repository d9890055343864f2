"""Benchmarks: python launch/bench.py inference RUN [--threads 1 2] [--json]

Exit codes: 0 done; 2 a mistake in the call, or a folder that is not right; 1 a fault of ours.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from leap_dist.errors import UserError


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Measure; nothing is reported where a result is wrong.",
        epilog="Exit codes: 0 done; 2 a mistake in the call, or a folder that is not right; 1 a fault of ours.",
    )
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    inference = commands.add_parser("inference", help="a run's model: dense, masked and shrunk; torch and onnxruntime")
    inference.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run of launch/prune.py")
    inference.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N", help="default: 1 2")
    inference.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    inference.set_defaults(command=bench_inference)
    return parser.parse_args()


def bench_inference(arguments: argparse.Namespace) -> None:
    """Latency of a run's models beside their FLOPs."""
    from leap_dist.export import inference
    from leap_dist.export.run_folder import read_run

    if wrong := [count for count in arguments.threads if count < 1]:
        raise UserError(f"--threads: got {wrong[0]}; allowed: integers >= 1")
    report(inference.bench_inference(read_run(arguments.run), arguments.threads), arguments.json)


def report(result: dict[str, Any], as_json: bool) -> None:
    """Print what was measured, and on which machine."""
    from leap_dist.train.progress import console, summary_table

    if as_json:
        print(json.dumps(result, indent=2))
        return
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    cores = f"{machine['cores']} cores, load {machine['load']:.2g} before"
    for line in (f"{machine['processor']}, {cores}, {machine['system']}", versions, *result["notes"]):
        console().print(line, markup=False, soft_wrap=True)
    console().print(f"commit {machine['commit'] or 'unknown'}", markup=False)
    summary_table(result["times"], title="medians; ratios to dense in the same engine")


def main() -> int:
    """Parse and run; the exit code."""
    arguments = parse_arguments()
    try:
        arguments.command(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
