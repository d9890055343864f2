"""Nothing that a file can hold comes out as anything but a UserError.

    LEAP_FUZZ_EXAMPLES=10000 python -m pytest -q tests/config/test_fuzz.py

tries so many files of each kind.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from leap_dist.config.job_file import load_job, parse_job
from leap_dist.config.section import show
from leap_dist.errors import UserError
from leap_dist.run_folder import read_run
from leap_dist.tasks.tables import read_cells, read_table
from tests.sweep.jobs import JOB

EXAMPLES = int(os.environ.get("LEAP_FUZZ_EXAMPLES", "60"))
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
many = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=QUIET)

NAMES = [
    "target",
    "gates",
    "epochs",
    "max_steps",
    "element",
    "block:2x2",
    "2:4",
    "re:.*",
    "re:(",
    "task",
    "auto",
    "0.5",
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, -1, 2**63, 10**400, -(10**400), 1e308, 5e-324, float("nan"), float("inf")]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(NAMES),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.sampled_from(NAMES), inner),
    max_leaves=8,
)
WHOLE_JOB: dict[str, Any] = JOB | {
    "zero_optimization": {"stage": 2},
    "leap": {"target": 0.5, "gates": [{"granularity": "head", "min_keep": 1}, "element"], "include": ["re:.*"]},
    "family": {"layers": "re:a.[0-9]+", "attention": {"module": "b", "query": "q"}, "ffn": [{"up": "u", "down": "d"}]},
    "distill": {"teacher": "self", "layers": [0, 1]},
}
HASH = "0" * 64
CERTIFICATE: dict[str, Any] = {
    "target": 0.5,
    "density": 0.5,
    "kept": 1,
    "prunable": 2,
    "metrics": {"pruned": {"accuracy": 0.5, "loss": None}},
    "gates": [{"granularity": "element", "tensors": ["a"]}],
    "tensors": {"a": {"shape": [2], "kept": 1, "zeros_kept": 0}},
    "masks_sha256": HASH,
    "weights_sha256": HASH,
}
DEEP = "[" * 100_000
DIGITS = "1" * 5000


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every part of nested settings."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [place for key, part in inner for place in places(part, (*path, key))]


@st.composite
def mutated(draw: Callable[..., Any], whole: dict[str, Any]) -> Any:
    """Valid settings with a few parts replaced, removed or added."""
    changed: Any = copy.deepcopy(whole)
    for path in draw(st.lists(st.sampled_from(places(whole)[1:]), min_size=1, max_size=3)):
        place = changed
        with contextlib.suppress(KeyError, IndexError, TypeError):  # an earlier change has taken it away
            for key in path[:-1]:
                place = place[key]
            action = draw(st.sampled_from(["replace", "remove", "add"]))
            if action == "replace":
                place[path[-1]] = draw(VALUES)
            elif action == "remove":
                del place[path[-1]]
            else:
                place[draw(st.text(max_size=5) | st.sampled_from(NAMES))] = draw(VALUES)
    return changed


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def only_user_errors(action: Callable[[], Any]) -> None:
    with contextlib.suppress(UserError):
        action()


@many
@given(raw=mutated(WHOLE_JOB) | VALUES | st.dictionaries(st.sampled_from([*WHOLE_JOB, "optimizer"]), VALUES))
def test_a_job_of_any_content(raw: Any) -> None:
    only_user_errors(lambda: parse_job(raw).resolved())


@many
@given(
    content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode) | mutated(WHOLE_JOB).map(as_json),
    override=st.text(max_size=20)
    | st.tuples(st.sampled_from(NAMES), VALUES).map(lambda pair: f"leap.{pair[0]}={pair[1]}"),
)
@example(content=DEEP.encode(), override="")
@example(content=as_json(WHOLE_JOB), override=f"leap.target={DEEP}")
@example(content=as_json(WHOLE_JOB), override=f"leap.target={DIGITS}")
@example(content=b'{"bf16": {"enabled": 1e999}}', override="leap.target=0.5")
def test_a_job_file_of_any_bytes(tmp_path: Path, content: bytes, override: str) -> None:
    file = tmp_path / "job.json"
    file.write_bytes(content)
    only_user_errors(lambda: load_job(file, [override]))


@many
@given(
    job=mutated({"leap": {}, "model": {}, "family": None}).map(as_json) | st.binary(max_size=40),
    certificate=mutated(CERTIFICATE).map(as_json) | VALUES.map(as_json) | st.binary(max_size=40),
)
@example(job=DEEP.encode(), certificate=b"{}")
@example(job=as_json({"leap": {}, "model": {}}), certificate=DEEP.encode())
@example(job=as_json({"leap": {}, "model": {}}), certificate=f'{{"target": {DIGITS}}}'.encode())
def test_a_run_folder_of_any_content(tmp_path: Path, job: bytes, certificate: bytes) -> None:
    (tmp_path / "config.json").write_bytes(job)
    (tmp_path / "certificate.json").write_bytes(certificate)
    with pytest.raises(UserError):  # it has no model
        read_run(tmp_path)


LINES = st.lists(
    st.one_of(
        st.text(max_size=12).map(str.encode),
        st.binary(max_size=12),
        st.sampled_from(
            [b"a\tb", b"a,b", b'"a', b"\x00", b'{"a": 1, "b": null}', b"{}", b'{"a": NaN, "b": []}', b"\r"]
        ),
        st.dictionaries(st.sampled_from("ab"), VALUES).map(as_json),
    ),
    max_size=6,
)


@many
@given(
    lines=LINES,
    suffix=st.sampled_from(
        [".tsv", ".csv", ".jsonl", ".json", ".txt", ".CSV", ".xls", ".parquet", ".csv.gz", ".csv.zst"]
    ),
)
@example(lines=[b'{"a": ' + DEEP.encode()], suffix=".jsonl")
@example(lines=[b'{"b": 1, "a": ' + DIGITS.encode() + b"}"], suffix=".jsonl")
@example(lines=[b"a,b", b"x" * 200_000 + b",1"], suffix=".csv")
def test_a_table_of_any_bytes(tmp_path: Path, lines: list[bytes], suffix: str) -> None:
    file = tmp_path / f"data{suffix}"
    file.write_bytes(b"\n".join(lines))
    only_user_errors(lambda: list(read_cells("data.train", file, [("data.text", "a"), ("data.label", "b")])))
    only_user_errors(lambda: read_table("data.train", [file], ["a"], "b"))
    file.unlink()


@many
@given(value=VALUES)
def test_any_value_can_be_shown(value: Any) -> None:
    assert len(show(value)) <= 80
