"""A job on a streamed dataset: two ranks, stopped and resumed, end where an undisturbed one ends."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from leap_dist.config.job_file import parse_job
from leap_dist.errors import UserError
from leap_dist.train.signals import Interrupted
from leap_dist.train.watch import Watch
from tests.checkpoint.test_checkpoints import this_rank
from tests.ranks import RankPools
from tests.tasks.conftest import speaker  # noqa: F401

MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 262,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def run(folder: Path, job: dict[str, Any], stop: int | None = None) -> str:
    """How a run is interrupted, or ends in a mistake."""
    from leap_dist.train.loop import run_job

    done = [0]

    def told(step: int, total: int, measures: Mapping[str, float]) -> None:
        done[0] = step

    def asked() -> str | None:
        return "SIGTERM" if stop is not None and done[0] >= stop else None

    try:
        run_job(parse_job(job), folder, False, this_rank(), Watch(notify=told, asked=asked))
    except (Interrupted, UserError) as error:
        return str(error)
    return ""


def runs(folder: str, job: dict[str, Any], short: dict[str, Any]) -> list[str]:
    place = Path(folder)
    words = [run(place / "whole", job), run(place / "broken", job, stop=8), run(place / "broken", job)]
    return [*words, run(place / "short", short)]


def test_a_streamed_job_resumes_exactly(
    ranks: RankPools,
    tmp_path: Path,
    speaker: Any,  # noqa: F811
    data_dir: Path,
) -> None:
    speaker.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "set").mkdir()
    articles = json.loads(next((data_dir / "squad").glob("dev*.json")).read_text("utf-8"))["data"]
    texts = [{"text": paragraph["context"]} for article in articles for paragraph in article["paragraphs"]][:40]
    for number in range(2):
        rows = "\n".join(map(json.dumps, texts[number::2]))
        (tmp_path / "set" / f"train-{number}.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    (tmp_path / "set" / "validation.jsonl").write_text("\n".join(map(json.dumps, texts[:2])), "utf-8")
    data = {"task": "lm", "dataset": str(tmp_path / "set"), "streaming": True, "shuffle_buffer": 12, "max_length": 64}
    job: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 16,
        "zero_optimization": {"stage": 2},
        "model": {"from_config": MODEL},
        "data": data | {"tokenizer": str(tmp_path / "tokenizer")},
        "train": {"max_steps": 20, "learning_rate": 1e-3, "log_every": 1},
        "leap": {"target": 0.5},
        "tracking": {"mlflow_uri": None},
    }
    first, second = ranks(2).run(runs, str(tmp_path), job, job | {"train_micro_batch_size_per_gpu": 10**5})
    assert first == second and first[0] == "" == first[2]
    assert first[1].startswith("stopped by SIGTERM after step ")
    assert "set train: ended behind row 40, before step 1 of 20 was full, which takes 200000 blocks of 64" in first[3]
    assert not (tmp_path / "short").exists()  # nothing is written of a job that cannot begin
    whole, broken = (json.loads((tmp_path / name / "certificate.json").read_text()) for name in ("whole", "broken"))
    assert whole == broken and whole["density"] == pytest.approx(0.5, abs=1e-3)
