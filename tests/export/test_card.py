"""The head of an export's page, as the Hugging Face hub reads it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants

from leap_dist.export.card import Card, Pair
from leap_dist.export.kinds import export_run
from leap_dist.export.push import hub_id
from leap_dist.run_folder import Run, read_run
from tests.export.runs import classifier, make_run, structure_masks


@pytest.mark.parametrize(("kind", "library"), [("shrunk", "transformers"), ("onnx", "onnx")])
@pytest.mark.parametrize("base", [None, "bert-base-uncased", "google/bert: large"])
def test_the_hub_reads_the_card(kind: str, library: str, base: str | None) -> None:
    card = Card(kind, target=0.5, density=0.5, metrics={}, bytes=Pair(2, 1), base_model=base)
    read: dict[str, Any] = ModelCard(card.page(), ignore_metadata_errors=False).data.to_dict()
    known = {"base_model": base} if base else {}
    assert read == {"library_name": library, "tags": ["pruning", "leap"], **known}
    assert f"# {kind}: " in card.page()


def begun_from(run: Run, name: str | None) -> Run:
    return replace(run, job={"model": {"name": name}})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return read_run(make_run(tmp_path_factory.mktemp("runs") / "run", classifier(), {}))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert", "bert"),
        ("a/b", "a/b"),
        *((name, None) for name in ("models/bert", "my-model", None, "./a", "x/y/z", "~/a", "my model")),
    ],
)
def test_the_base_model_is_a_hub_id(
    name: str | None, expected: str | None, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that the cache has came from the hub; another one may be of a folder where the run was started."""
    for cached in ("models--bert", "models--a--b"):
        (tmp_path / "cache" / cached / "refs").mkdir(parents=True)
        (tmp_path / "cache" / cached / "refs" / "main").write_text("0" * 40)
        (tmp_path / "cache" / cached / "snapshots" / ("0" * 40)).mkdir(parents=True)
        (tmp_path / "cache" / cached / "snapshots" / ("0" * 40) / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (card,) = export_run(begun_from(run, name), ["mask"], tmp_path / "out", threads=1, latency=False)
    assert card.base_model == expected
    if name == "a/b":
        (tmp_path / "a" / "b").mkdir(parents=True)
        assert hub_id(begun_from(run, name)) is None


def test_a_card_says_what_the_target_is_a_share_of(tmp_path: Path) -> None:
    model = classifier()
    fixed = sum(value.numel() for value in model.parameters()) / 2
    folder = make_run(tmp_path / "run", model, structure_masks(model), "head", fixed=fixed)
    run = read_run(folder)
    (card,) = export_run(run, ["mask"], tmp_path / "out", threads=1, latency=False)
    target, density = run.certificate.target, run.certificate.density
    assert f"{target:.4f}" != f"{density:.4f}"
    assert (
        f"Pruned to a share of the model's parameters of {target:.4f} (target {target:g}), "
        f"a density of {density:.4f} of the prunable weights.\n"
    ) in card.page()
