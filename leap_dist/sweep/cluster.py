"""The cluster that a sweep runs on: reach it or start one here, and say what it has room for."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

from leap_dist.errors import UserError
from leap_dist.sweep.sweep_file import ResourcesConfig

PROBE, PATIENCE = 5.0, 12.0  # seconds: to open a connection, and for Ray to answer
STORE_BYTES = 128 * 2**20  # of an embedded Ray's object store: trials share nothing through it
LONGEST_FOLDER = 40  # bytes of Ray's folder: a socket's path has 107 at most, and Ray adds some sixty
QUIETLY: dict[str, Any] = {"ignore_cleanup_errors": True}  # Ray's last processes may still write
HINT = 'start one with "ray start --head", name another address, or leave --address out to run on this machine alone'


def is_installed() -> bool:
    """Whether Ray is, with what Tune needs."""
    try:
        import ray.tune  # noqa: F401
    except ImportError:
        return False
    return True


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """A connection to the cluster at `address`; None starts Ray on this machine, for as long as the block runs.

    Raises UserError within half a minute if there is no cluster.
    """
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")  # what Ray prints of a lost rank; we tell it in a line
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address is None:
        start: AbstractContextManager[None] = _start_here(quiet)
    else:
        _probe(address)
        _init_in_time(address, quiet)
        start = nullcontext()
    with start:
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _start_here(quiet: Mapping[str, Any]) -> Iterator[None]:
    """Ray on this machine. Its sockets are files whose paths must be short, so a long TMPDIR is not used for them."""
    import ray

    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    with ExitStack() as stack:
        try:
            if len(os.fsencode(folder)) > LONGEST_FOLDER:
                short = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", **QUIETLY))
                quiet = {**quiet, "_temp_dir": short}
            ray.init("local", include_dashboard=False, object_store_memory=STORE_BYTES, **quiet)
        except Exception as error:  # of many kinds: no room, no rights, no ports
            ray.shutdown()
            raise UserError(
                f"sweep: Ray does not start on this machine: {_first_line(error)}; fix that, or name a cluster with "
                "--address"
            ) from error
        yield


def _probe(address: str) -> None:
    """Raises UserError if nothing listens at host:port; "auto" has no place to look at."""
    if address == "auto":
        return
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not port or parts.scheme not in ("", "ray"):
        raise UserError(f'--address: got "{address}"; allowed: "auto", host:port, or ray://host:port')
    try:
        socket.create_connection((host, port), PROBE).close()
    except OSError as error:
        raise UserError(f"--address: nothing answers at {address} ({error}); {HINT}") from error


def _init_in_time(address: str, quiet: dict[str, Any]) -> None:
    """ray.init, which would wait for minutes on something that is no Ray."""
    import ray

    failed: list[Exception] = []

    def init() -> None:
        try:
            ray.init(address, **quiet)
        except Exception as error:  # Ray raises many kinds; all of them mean that there is no connection
            failed.append(error)

    thread = Thread(target=init, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if thread.is_alive():
        raise UserError(f"--address: what answers at {address} is not a Ray cluster; {HINT}")
    if failed:
        raise UserError(f"--address: no Ray cluster at {address}: {_first_line(failed[0])}; {HINT}") from failed[0]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def room(resources: ResourcesConfig) -> int:
    """Ranks that fit on the nodes that are there."""
    return sum(_fits(node, resources) for node in _nodes())


def check_room(ranks: int, resources: ResourcesConfig) -> int:
    """Trials that fit at a time. Raises UserError, saying what the cluster has, if not one does."""
    have = room(resources)
    if have < ranks:
        nodes = "; ".join(f"{name}: {r.get('CPU', 0):g} CPUs, {r.get('GPU', 0):g} GPUs" for name, r in _named())
        raise UserError(
            f"ranks: got {ranks}, each with {resources.cpus:g} CPUs and {resources.gpus} GPUs, but the cluster has "
            f"room for {have} ({nodes}); lower ranks or resources, or add nodes"
        )
    return have // ranks


def _named() -> list[tuple[str, dict[str, float]]]:
    import ray

    return [(node["NodeManagerAddress"], node["Resources"]) for node in ray.nodes() if node["Alive"]]


def _nodes() -> list[dict[str, float]]:
    return [have for _, have in _named()]


def _fits(have: dict[str, float], resources: ResourcesConfig) -> int:
    """Ranks that fit on one node."""
    by_cpu = int(have.get("CPU", 0.0) / resources.cpus + 1e-9)
    return min(by_cpu, int(have.get("GPU", 0.0)) // resources.gpus) if resources.gpus else by_cpu
