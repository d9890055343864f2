"""What tracking costs a step of the embedded job: python -m tests.bench.tracking [--rounds 5]

Blocks of steps of one job, in turn without tracking and with each of: a sqlite database, a real `mlflow server`, a
server that answers after five seconds, and one that went down after the run had begun. Every round has the variants in
another order. A block has measures every LOG_EVERY steps, as train.log_every has it, and a run of its own, whose
beginning and end are not counted. Writes results/tracking.json:

- milliseconds: of a step, median over rounds of the mean over a block; ratio: to the block without tracking, median;
- log: milliseconds that the training waits in `Tracker.log`, a step; sender: processor milliseconds of the sending
  thread, a step. Their sum over a step without tracking is `share`, which a busy machine does not blur.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from leap_dist.config.job_file import load_job
from leap_dist.config.sections import TrackingConfig
from leap_dist.machine import machine
from leap_dist.tracking import delivery
from leap_dist.tracking.mlflow import Tracker
from leap_dist.train.job import Job, build_job
from leap_dist.train.meter import Meter
from leap_dist.zero.ranks import start_ranks
from tests.tracking.proxy import Proxy
from tests.tracking.servers import Server

RESULTS = Path(__file__).resolve().parent / "results"
BLOCK, LOG_EVERY = 400, 10
SLOW = 5.0  # seconds
DENSE = "no tracking"


class Variants:
    """The stores to log to, by name; None: no tracking."""

    def __init__(self, folder: Path, server: Server) -> None:
        port = int(server.address.rsplit(":", 1)[1])
        self._slow, self._down = Proxy(port), Proxy(port)
        self.uris: dict[str, str | None] = {
            DENSE: None,
            "sqlite": f"sqlite:///{folder / 'mlflow.db'}",
            "server": server.address,
            "slow server": f"http://{self._slow.address}",
            "server that went down": f"http://{self._down.address}",
        }

    @contextmanager
    def begun(self, name: str, folder: Path) -> Iterator[Tracker]:
        """A run that has begun, and whose end is not waited for."""
        self._slow.delay, self._down.mode = 0.0, "open"
        with Tracker(TrackingConfig(mlflow_uri=self.uris[name]), {}, True, folder=folder) as tracker:
            self._slow.delay, self._down.mode = SLOW, "down"
            yield tracker


def senders() -> dict[int, float]:
    """Processor seconds of every sending thread so far; one may wait for the answer of a server of an earlier block."""
    ids = [thread.ident for thread in threading.enumerate() if thread.name == delivery.THREAD]
    return {ident: time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in ids if ident is not None}


def block(job: Job, first: int, tracker: Tracker) -> dict[str, float]:
    """Milliseconds a step of BLOCK steps: all of it, what Tracker.log took, and the sending thread's."""
    meter, waited = Meter(job.ranks, first), 0.0
    started, before_all = time.perf_counter(), senders()
    for step in range(first, first + BLOCK):
        for batch in job.batches.step(step):
            loss = job.engine(**batch).loss
            job.engine.backward(loss)
            job.engine.step()
            meter.count(batch)
        if (step + 1) % LOG_EVERY == 0:
            values = {"loss": loss.item(), **job.engine.leap.measures(), **meter.read(step + 1)}
            before = time.perf_counter()
            tracker.log(step + 1, values)
            waited += time.perf_counter() - before
    sent = sum(seconds - before_all.get(ident, 0.0) for ident, seconds in senders().items())
    seconds = time.perf_counter() - started, waited, sent
    return dict(zip(("milliseconds", "log", "sender"), (1e3 * value / BLOCK for value in seconds), strict=True))


def measure(rounds: int) -> dict[str, Any]:
    """All blocks, and what they come to."""
    delivery.PATIENCE = 0.0  # the end of a run is not what is measured
    steps = (rounds + 1) * 5 * BLOCK
    config = load_job("ds_leap.json", [f"train.max_steps={steps}", "leap.dense_fraction=0.01", "train.log_every=10"])
    job = build_job(config, start_ranks())
    order, measured = random.Random(0), []
    with tempfile.TemporaryDirectory() as scratch, Server(Path(scratch)) as server:
        variants = Variants(Path(scratch), server)
        step = 0
        for number in range(rounds + 1):  # the first round warms up
            found = {}
            for name in order.sample(list(variants.uris), len(variants.uris)):
                with variants.begun(name, Path(scratch) / f"{number} {name}") as tracker:
                    found[name] = block(job, step, tracker)
                step += BLOCK
                print(number, name, found[name], flush=True)
            measured.append(found)
    rows = {name: _row(name, measured[1:]) for name in variants.uris}
    settings = {"rounds": rounds, "steps a block": BLOCK, "log_every": LOG_EVERY}
    return {"machine": machine(), **settings, "rows": rows}


def _row(name: str, measured: list[dict[str, dict[str, float]]]) -> dict[str, float]:
    row = {key: statistics.median(found[name][key] for found in measured) for key in measured[0][name]}
    row["ratio"] = statistics.median(f[name]["milliseconds"] / f[DENSE]["milliseconds"] for f in measured)
    row["share"] = (row["log"] + row["sender"]) / statistics.median(f[DENSE]["milliseconds"] for f in measured)
    return {key: round(value, 5) for key, value in row.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    result = measure(parser.parse_args().rounds)
    (RESULTS / "tracking.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps(result["rows"], indent=1))
