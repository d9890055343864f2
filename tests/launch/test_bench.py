"""launch/bench.py overhead, select and scale: what they report, and when they refuse to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from leap_dist.bench import jumps, overhead, scale, select
from leap_dist.bench.overhead import DENSE, DENSE_FUSED, GATES, ORACLE, Setting, measure, with_ratios
from leap_dist.bench.printing import print_result
from leap_dist.bench.processes import on_ranks
from leap_dist.errors import UserError
from tests.launch.scripts import load_script
from tests.ranks import RankPools
from tests.tracking.stored import wait_for

pytestmark = pytest.mark.slow

QUICK: dict[str, int] = {"batch": 2, "length": 8, "steps": 1}


def launch(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the launcher in this process; its exit code."""
    module = load_script("bench")
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    code: int = module.main()
    return code


# ------------------------------------------------------------------------------ overhead


def test_every_variant_is_timed(ranks: RankPools) -> None:
    result = ranks(2).run(measure, Setting(**QUICK, stage=3, ranks=2))[0]
    assert list(result["variants"]) == [DENSE, DENSE_FUSED, *GATES, ORACLE]
    assert result["variants"][DENSE]["ratio"] == 1.0
    assert all(row["seconds"] > 0 for row in result["variants"].values())
    assert max(result["error_to_oracle"].values()) <= overhead.TOLERANCE
    assert [note.split(":")[0] for note in result["notes"]] == [ORACLE]


def test_json_is_one_object_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert launch(monkeypatch, "overhead", "--batch", "2", "--length", "8", "--steps", "1", "--json") == 0
    result = json.loads(capfd.readouterr().out)
    assert result["variants"]["dense"].keys() >= {"seconds", "ratio"} and result["variants"]["element"]["ratio"] > 0
    assert result["machine"].keys() >= {"processor", "cores", "load", "versions", "commit"}
    print_result(result)
    shown = capfd.readouterr().out
    assert "load " in shown and "torch 2." in shown and "commit " in shown and "head+neuron" in shown


def test_nothing_is_reported_where_leap_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (2 * overhead.TOLERANCE, float("nan")):
        monkeypatch.setattr(overhead, "check_against_oracle", lambda gates, stage, wrong=wrong: wrong)
        with pytest.raises(RuntimeError, match="LEAP's weights differ from the oracle's, nothing is reported: element"):
            measure(Setting())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--stage", "4", "--stage: got 4; allowed: 0, 1, 2 or 3"),
        ("--batch", "0", "--batch: got 0; allowed: an integer >= 1"),
        ("--ranks", "-1", "--ranks: got -1; allowed: an integer >= 1"),
    ],
)
def test_a_mistake_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    assert launch(monkeypatch, "overhead", option, value) == 2
    shown = capsys.readouterr()
    assert shown.err == f"error: {message}\n" and shown.out == ""


def test_a_batch_fits_the_model() -> None:
    model = overhead.load_model(overhead.ModelConfig(from_config=overhead.TINY), overhead.empty_task(overhead.TASK))
    with pytest.raises(UserError, match="--length: got 999; allowed: at most 128, the positions of the model"):
        overhead.random_batch(model, Setting(length=999))


def test_ratios_are_to_dense() -> None:
    rows = with_ratios({DENSE: [1.0, 4.0, 2.0], "element": [3.0, 1.5, 9.0]})
    assert rows["element"] == {"seconds": 3.0, "ratio": 1.5, "fastest": 1.5, "fastest ratio": 1.5}


# ------------------------------------------------------------------------------ rank processes


def test_ranks_answer_in_order_and_leave_nothing() -> None:
    before = dict(os.environ)
    assert on_ranks(2, place, 10) == [(10, 2, 1), (11, 2, 1)]
    assert dict(os.environ) == before


def place(first: int) -> tuple[int, int, int]:
    group = torch.distributed
    return first + group.get_rank(), group.get_world_size(), torch.get_num_threads()


WAITS = """
import os, sys, time
from leap_dist.bench.processes import on_ranks

def wait(place):
    with open(place, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(120)

if __name__ == "__main__":
    on_ranks(1, wait, sys.argv[1])
"""


def test_ranks_end_with_a_benchmark_that_is_killed_in_the_background(tmp_path: Path) -> None:
    """A shell's background commands, and those of nohup, ignore the signal that torch has sent to ranks left alone."""
    place = tmp_path / "rank"
    (tmp_path / "waits.py").write_text(WAITS)
    command = [sys.executable, str(tmp_path / "waits.py"), str(place)]
    process = subprocess.Popen(["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command])
    wait_for(lambda: place.is_file() and bool(place.read_text()))
    rank = psutil.Process(int(place.read_text()))
    process.kill()
    process.wait()
    rank.wait(30)


def test_a_mistake_in_a_rank_is_the_users() -> None:
    with pytest.raises(UserError, match="no such thing"):
        on_ranks(1, refuse)


def refuse() -> None:
    raise UserError("no such thing")


# ------------------------------------------------------------------------------ select


def test_select_reports_every_size(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(select, "bench_select", partial(select.bench_select, [1, 1000, 4099]))
    assert launch(monkeypatch, "select", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["sizes"]
    assert [row["scores"] for row in rows] == [1, 1000, 4099]
    assert all(row.keys() == {"scores", "sort", "topk", "kthvalue", "cold", "warm", "sort / warm"} for row in rows)


def test_select_leaves_out_what_takes_too_long_or_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "MOST_SECONDS", 0.0)
    result = select.bench_select([1000, 2000])
    assert result["sizes"][1] == {"scores": 2000}
    assert result["notes"][0] == "without sort at 2e+03 scores: about 0 s, more than 0"
    monkeypatch.setattr(select, "free_memory", lambda: 64_000)
    result = select.bench_select([1001])
    assert len(result["notes"]) == 5 and "up to 0.0 GB, and 0.0 are free" in result["notes"][0]
    assert result["sizes"] == [{"scores": 1001}]


def test_jumps_of_the_level_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "LEAST_JUMP", 10**4)
    rows = select.bench_select([1000, 126_000])["jumps"]
    assert [(row["scores"], row["kind"]) for row in rows] == [(126_000, kind) for kind in jumps.SCORES]
    names = {"warm", "cold / warm", "to 0.6 / warm", "to 0.2 / warm", "peak bytes / score"}
    assert all(row.keys() == names | {"scores", "kind"} and all(row[name] > 0 for name in names) for row in rows)


def test_a_wrong_mask_after_a_jump_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jumps.Selector, "masks_", lambda self, runs, keep: runs[0].mask.fill_(True))
    with pytest.raises(RuntimeError, match="a selection of 200 of 1000 scores took 1000"):
        jumps.measure(126_000, "normal")


def test_select_refuses_other_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "select", lambda selector, scores, keep: scores < 0)
    with pytest.raises(RuntimeError, match="warm selects others of 1000 scores than sort"):
        select.measure(1000, ["sort", "warm"])


def test_ties_at_the_cut_go_to_the_lowest_index() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0])
    assert select.exact_mask(scores, torch.tensor(2.0), 3).tolist() == [False, True, True, True, False]
    assert select.select(select.new_selector(5), scores, 3).tolist() == [False, True, True, True, False]


# ------------------------------------------------------------------------------ scale


@pytest.mark.parametrize("world", [1, 2])
def test_the_model_agrees_with_real_ranks(ranks: RankPools, world: int) -> None:
    rows = ranks(world).run(scale.count_traffic)[0]
    assert [row["gates"] for row in rows] == list(scale.GATES)
    scale.check_model(rows)


def test_scale_refuses_a_wrong_model() -> None:
    row: dict[str, Any] = {key: 100 for name in ("collectives", "bytes", "state") for key in (name, f"modelled {name}")}
    scale.check_model([row])
    with pytest.raises(RuntimeError, match="the model of the cost is wrong, nothing is reported: bytes"):
        scale.check_model([row | {"modelled bytes": 98}])


def test_scale_reports_ranks_and_models(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(scale, "on_ranks", lambda ranks, function: [[]])
    assert launch(monkeypatch, "scale", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["ranks"] for row in result["ranks"]] == [2**power for power in range(11)]
    held = [row["LEAP MB held"] for row in result["ranks"]]
    assert held == sorted(held, reverse=True)
    assert len({row["LEAP MB sent"] for row in result["ranks"][1:]}) == 1
    assert {row["model"] for row in result["models"]} == set(scale.MODELS)
    assert result["bert_base_ratio"] == pytest.approx(result["ranks"][1]["% of gradients"] / 100)
    print_result(result)
    assert "LEAP adds " in capsys.readouterr().out
