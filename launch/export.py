"""Export a finished run: python launch/export.py RUN --to shrunk,gguf [--output DIR]

With --vocabulary TEXT it keeps the tokens that the texts use, also of a model that no run pruned.

SIGTERM, SIGINT and SIGUSR1: what is half written is removed, kinds that are done stay; the same command starts anew.
Exit codes: 0 done; 1 a fault; 2 a mistake in the command line, or no finished run in the folder; 3 stopped by a signal.
"""

import argparse
import sys
from pathlib import Path

from leap_dist.cli import check_threads, parsed
from leap_dist.errors import UserError, own_words, printable
from leap_dist.files import user_path


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Export a pruned model, each kind in a folder of its own with a card of its size and speed.",
        epilog="SIGTERM, SIGINT and SIGUSR1: what is half written is removed, kinds that are done stay. "
        "Exit codes: 0 done; 1 a fault; 2 a mistake in the command line, or no finished run in the folder; "
        "3 stopped by a signal, the same command starts anew.",
    )
    parser.add_argument(
        "run", type=user_path, metavar="RUN", help="folder of a finished run of launch/prune.py, or of a model"
    )
    parser.add_argument(
        "--to",
        required=True,
        action="append",
        metavar="KINDS",
        help="one or more of hf, shrunk, onnx, mask, semi_structured, gguf, gguf_q8_0, gguf_q4_k_m, int8, int8_torch, "
        "with commas",
    )
    parser.add_argument("--output", type=user_path, metavar="DIR", help="folder for the exports (default: RUN/export)")
    for name, text in (
        ("--vocabulary", "keep the tokens that these files use, and special and byte tokens"),
        ("--held-out", "with --vocabulary: files whose tokens are counted before and after"),
    ):
        parser.add_argument(name, type=user_path, nargs="+", action="extend", metavar="TEXT", help=text)
    parser.add_argument("--vocabulary-size", type=int, metavar="N", help="keep the N most frequent tokens at most")
    parser.add_argument(
        "--push-to-hub", metavar="OWNER/NAME", help="put the export, of one kind, on the Hugging Face hub as well"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="number of threads for measuring latencies")
    parser.add_argument("--no-latency", action="store_true", help="do not measure latencies")
    return parsed(parser)


def main() -> int:
    """Parse, export, report; the exit code."""
    arguments = parse_arguments()
    from leap_dist.export.stop import Stopped, stoppable
    from leap_dist.stopping import STOPPED

    written: list[str] = []
    try:
        with stoppable():
            export(arguments, written)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as why:
        kept = f"{', '.join(written)} written, which stays" if written else "nothing was written"
        print(f"stopped by {why}: {kept}; the same command starts anew", file=sys.stderr)
        return STOPPED
    return 0


def export(arguments: argparse.Namespace, written: list[str]) -> None:
    """Export and report. written: filled with the kinds that are there."""
    import torch

    from leap_dist.console import console, summary_table
    from leap_dist.export.kinds import export_run, parse_kinds
    from leap_dist.export.push import Hub
    from leap_dist.export.vocabulary import wanted_of
    from leap_dist.run_folder import EXPORTS, read_run_or_model

    kinds = parse_kinds(",".join(arguments.to))
    threads = torch.get_num_threads() if arguments.threads is None else arguments.threads
    check_threads(threads)
    wanted = wanted_of(arguments.vocabulary, arguments.vocabulary_size, arguments.held_out)
    hub = Hub(arguments.push_to_hub, kinds) if arguments.push_to_hub is not None else None
    run = read_run_or_model(arguments.run)
    output = arguments.output or arguments.run / EXPORTS
    cards = []
    for card in export_run(run, kinds, output, threads, not arguments.no_latency, wanted):
        written.append(card.kind)
        console().print(f"{card.kind}: {output / card.kind}", markup=False, soft_wrap=True)
        cards.append(card)
    title = f"density {run.certificate.density:.4g}, dense → exported, {threads} thread{'s' * (threads > 1)}"
    summary_table([card.row() for card in cards], title=title)
    if rows := [row for card in cards for row in card.engine_rows()]:
        summary_table(rows, title="what loads it")
    if arguments.output is None and not run.plain:
        report(arguments.run)
    if hub:
        address = hub.push(output / kinds[0], f"{kinds[0]}, density {run.certificate.density:.4g}")
        console().print(address, markup=False, soft_wrap=True)


def report(folder: Path) -> None:
    """The run's page shows its exports, which are there whatever becomes of the page."""
    from leap_dist.run_folder import REPORT
    from leap_dist.tracking.report import write_report

    try:
        write_report(folder)
    except (OSError, UserError) as error:
        text = (
            f"warning: {folder / REPORT} could not be written: {own_words(error)}; the exports are complete; mend "
            "that, and run the same command again to make the page"
        )
        print(printable(text), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
