"""What is no finished run is refused with one message; an export folder is complete or not there."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from leap_dist.errors import UserError
from leap_dist.export.hf import load_exported
from leap_dist.export.kinds import export_run, weight_bytes
from leap_dist.export.place import refuse_foreign
from leap_dist.files import staged
from leap_dist.run_folder import exports, read_files, read_run, sealed
from tests.export.runs import QUERY, classifier, element_masks, make_run
from tests.tracking.folders import export_card


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = classifier()
    return make_run(tmp_path_factory.mktemp("runs") / "run", model, element_masks(model))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_finished_run_is_read(run: Path) -> None:
    read = read_run(run)
    assert read.granularities == ["element"] and read.family is None
    assert read.certificate.kept == sum(tensor.kept for tensor in read.certificate.tensors.values())
    model = load_exported(read.model)
    assert type(model).__name__ == "BertForSequenceClassification" and not model.training
    assert (model.get_parameter(QUERY) == 0).any()


def test_the_jobs_family_is_the_runs(run: Path) -> None:
    attention = {"module": "attn", "qkv": "attn.qkv", "output": "attn.out", "head_size": 8}
    section = {"layers": "blocks.*", "attention": [attention]}
    (run / "config.json").write_text(json.dumps({"leap": {}, "model": {}, "family": section}))
    family = read_run(run).family
    assert family is not None and family.attention[0].qkv == "attn.qkv"


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def change_one_weight(run: Path) -> None:
    file = run / "model" / "model.safetensors"
    weights = load_file(file)
    weights[QUERY][0, 0] += 1
    save_file(weights, file, {"format": "pt"})


def edit(run: Path, **changes: object) -> None:
    file = run / "certificate.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_knowing(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit the certificate as somebody would who knows about its digest."""
    file = run / "certificate.json"
    body = json.loads(file.read_text())
    change(body)
    file.write_text(json.dumps(sealed(body)))


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "target": lambda c: c.update(target=0.1),
    "density": lambda c: c.update(density=0.1),
    "unit": lambda c: c.update(unit=10**6),
    "kept": lambda c: c.update(kept=5),
    "prunable": lambda c: c.update(prunable=10**6),
    "a metric": lambda c: c["metrics"]["pruned"].update(accuracy=1.0),
    "a gate": lambda c: c["gates"][0].update(granularity="head"),
    "a gate's density": lambda c: c["gates"][0].update(density=0.01),
    "a gate less": lambda c: c["gates"].pop(),
    "a tensor's shape": lambda c: c["tensors"][QUERY].update(shape=[2, 2]),
    "a tensor's count": lambda c: c["tensors"][QUERY].update(kept=1),
    "a tensor's zeros": lambda c: c["tensors"][QUERY].update(zeros_kept=3),
    "counted": lambda c: c["tensors"][QUERY].update(counted=False),
    "masks": lambda c: c.update(masks_sha256="0" * 64),
    "the seed": lambda c: c.update(seed=4),
    "versions": lambda c: c["versions"].update(torch="1"),
    "another key": lambda c: c.update(more=1),
}
RECOUNTED = {"density", "kept", "prunable", "a gate's density", "a gate less", "a tensor's shape", "a tensor's count"}
RECOUNTED |= {"a tensor's zeros", "counted"}


@pytest.mark.parametrize("edited", EDITS)
def test_an_edited_certificate_is_refused(run: Path, edited: str) -> None:
    body = json.loads((run / "certificate.json").read_text())
    EDITS[edited](body)
    (run / "certificate.json").write_text(json.dumps(body))
    with pytest.raises(UserError, match=r"certificate.json: (was changed|does not say what the weights are)"):
        read_run(run)
    with pytest.raises(UserError, match=r"certificate.json: was changed: its sha256 is not that of its content"):
        read_files(run)


@pytest.mark.parametrize("edited", sorted(RECOUNTED))
def test_an_edited_certificate_with_its_digest_is_recounted(run: Path, edited: str) -> None:
    edit_knowing(run, EDITS[edited])
    with pytest.raises(UserError, match=r"certificate.json: does not say what the weights are: "):
        read_run(run)


def test_a_certificate_of_an_older_version_is_recounted_and_the_card_says_what_was_not_checked(
    run: Path, tmp_path: Path
) -> None:
    body = json.loads((run / "certificate.json").read_text())
    del body["sha256"]
    (run / "certificate.json").write_text(json.dumps(body))
    (card,) = export_run(read_run(run), ["mask"], tmp_path / "out", threads=1, latency=False)
    assert "without a digest of its own content" in card.notes[-1]
    for edited in sorted(RECOUNTED):
        changed = json.loads(json.dumps(body))
        EDITS[edited](changed)
        (run / "certificate.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match="does not say what the weights are"):
            read_run(run)


def test_an_edited_target_is_not_within_a_unit(run: Path) -> None:
    edit_knowing(run, EDITS["target"])
    with pytest.raises(UserError, match="does not say what the weights are: the density is not the target"):
        read_run(run)


def test_an_edited_card_is_refused(run: Path) -> None:
    export_card(run, "hf", 3.0)
    assert exports(run)[0].latency == 3.0
    card = run / "export" / "hf" / "card.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"density": 0.01}))
    with pytest.raises(UserError, match=r"card.json: was changed"):
        exports(run)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: shutil.rmtree(run), "RUN: got .*run; there is no such folder"),
        (lambda run: (run / "config.json").unlink(), "that folder is not a run: it has no config.json of a job"),
        (lambda run: (run / "config.json").write_text("{"), "that folder is not a run"),
        (lambda run: shutil.copy(run / "model" / "config.json", run), "that folder is not a run"),
        (
            lambda run: (run / "certificate.json").unlink(),
            r"the run is not finished, it has no certificate.json; finish it with .* --resume",
        ),
        (lambda run: truncate(run / "certificate.json"), r"certificate.json: damaged: not JSON: line "),
        (lambda run: edit(run, gates=3), r"certificate.json: damaged: gates: "),
        (lambda run: edit(run, masks_sha256="12"), r"certificate.json: damaged: masks_sha256: "),
        (lambda run: edit(run, tensors={"a": {"shape": [1]}}), r"damaged: tensors\.a\.kept: Field required"),
        (change_one_weight, r"the weights are not those of the certificate: their sha256 is [0-9a-f]{64}, "),
        (lambda run: edit(run, weights_sha256="0" * 64), "certificate.json says 0{64}; restore the folder"),
        (lambda run: truncate(run / "model" / "model.safetensors"), r"run/model: the weights cannot be read: "),
        (
            lambda run: (run / "model" / "model.safetensors").unlink(),
            r"run/model: the weights cannot be read: neither model.safetensors nor",
        ),
    ],
)
def test_what_is_no_finished_run_is_refused(run: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(run)
    with pytest.raises(UserError, match=message) as caught:
        read_run(run)
    assert "\n" not in str(caught.value)


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    refuse_foreign(tmp_path / "not" / "there" / "yet")
    (tmp_path / "thesis").mkdir()
    with pytest.raises(UserError, match="thesis exists and is not an export; remove it"):
        refuse_foreign(tmp_path / "thesis")
    (tmp_path / "note").touch()
    with pytest.raises(UserError, match=re.escape(f"cannot be made: {tmp_path / 'note'} is not a folder")):
        refuse_foreign(tmp_path / "note" / "hf")
    (tmp_path / "thesis" / "card.json").touch()
    refuse_foreign(tmp_path / "thesis")


def write(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "card.json").write_text(text)


def test_an_older_export_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "export" / "hf"
    with staged(target) as folder:
        write(folder, "first")
        assert not target.exists()
    with pytest.raises(RuntimeError, match="no space"), staged(target) as folder:
        write(folder, "second")
        raise RuntimeError("no space")
    assert (target / "card.json").read_text() == "first"
    (tmp_path / "export" / ".hf.partial").mkdir()
    with staged(target) as folder:
        write(folder, "third")
    assert (target / "card.json").read_text() == "third"
    assert [path.name for path in target.parent.iterdir()] == ["hf"]


def test_only_weight_files_are_weighed(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(10)}, tmp_path / "model.safetensors")
    (tmp_path / "model.onnx").write_bytes(b"12345")
    (tmp_path / "card.json").write_text("{}")
    assert weight_bytes(tmp_path) == (tmp_path / "model.safetensors").stat().st_size + 5
