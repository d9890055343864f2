"""The head of an export's page, as the Hugging Face hub reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from leap_dist.export.card import Card, Pair
from leap_dist.export.kinds import _hub_id


@pytest.mark.parametrize(("kind", "library"), [("shrunk", "transformers"), ("onnx", "onnx")])
@pytest.mark.parametrize("base", [None, "bert-base-uncased", "google/bert: large"])
def test_the_hub_reads_the_card(kind: str, library: str, base: str | None) -> None:
    card = Card(kind, target=0.5, density=0.5, metrics={}, bytes=Pair(2, 1), base_model=base)
    read: dict[str, Any] = ModelCard(card.page(), ignore_metadata_errors=False).data.to_dict()
    known = {"base_model": base} if base else {}
    assert read == {"library_name": library, "tags": ["pruning", "leap"], **known}
    assert f"# {kind}: " in card.page()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("bert-base-uncased", "bert-base-uncased"), ("a/b", "a/b"), (None, None), ("./a", None), ("x/y/z", None)],
)
def test_the_base_model_is_a_hub_id(
    name: str | None, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Finished:
        job = {"model": {"name": name}}  # noqa: RUF012

    monkeypatch.chdir(tmp_path)
    assert _hub_id(Finished()) == expected  # type: ignore[arg-type]
    if name == "a/b":
        (tmp_path / "a" / "b").mkdir(parents=True)
        assert _hub_id(Finished()) is None  # type: ignore[arg-type]
