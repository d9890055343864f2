"""A step's loss is the mean over its words with a label, however the step is cut into micro-batches and ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from leap_dist.config.job_file import parse_job
from tests.checkpoint.test_checkpoints import this_rank
from tests.ranks import RankPools
from tests.tasks.conftest import speaker  # noqa: F401
from tests.tasks.test_chats import TEMPLATES
from tests.train.test_stream_job import MODEL


def losses(folder: str, job: dict[str, Any], layouts: list[tuple[int, int]]) -> list[list[float]]:
    """Of every step, by layout (micro-batch, accumulation)."""
    from leap_dist.train.loop import run_job

    found = []
    for micro, number in layouts:
        own = job | {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": number}
        place = Path(folder) / f"{this_rank().world_size}_{micro}_{number}"
        run_job(parse_job(own), place, False, this_rank())
        found.append([json.loads(line)["loss"] for line in (place / "metrics.jsonl").read_text().splitlines()])
    return found


def test_conversations_of_uneven_answers_train_as_one_batch(
    ranks: RankPools,
    tmp_path: Path,
    speaker: Any,  # noqa: F811
) -> None:
    """Micro-batches of few and of many words counted alike: the loss was off by 5 % within 12 steps."""
    speaker.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(TEMPLATES["plain"])
    texts = [f"{number:2} {'what is it, and what is it for? ' * 3}" for number in range(16)]  # of one length
    cuts = [5, len(texts[0]) - 3]
    rows = [{"prompt": text[: cuts[i % 2]], "completion": text[cuts[i % 2] :].strip()} for i, text in enumerate(texts)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {key: str(tmp_path / "rows.jsonl") for key in ("train", "validation")}
    job = {
        "zero_optimization": {"stage": 1},
        "model": {"from_config": MODEL | {"max_position_embeddings": 256}},
        "data": {"task": "lm", **files, "tokenizer": str(tmp_path / "tokenizer"), "max_length": 256},
        "train": {"max_steps": 12, "learning_rate": 1e-2, "log_every": 1},
        "leap": {"target": 0.5},
        "tracking": {"mlflow_uri": None},
    }
    ((whole, cut),) = ranks(1).run(losses, str(tmp_path), job, [(4, 1), (1, 4)], timeout=300)
    spread = ranks(2).run(losses, str(tmp_path), job, [(2, 1), (1, 2)], timeout=300)
    assert len(whole) == 12 and whole[-1] < whole[0]
    for found in (cut, *spread[0]):
        assert found == pytest.approx(whole, rel=2e-4)
