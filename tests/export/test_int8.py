"""Fewer bits after pruning: sizes multiply, and metrics are measured anew or said not to be."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import onnx
import pytest
import torch

from leap_dist.errors import UserError
from leap_dist.export import int8, latency, metric
from leap_dist.export.kinds import export_run
from leap_dist.export.latency import torch_runner
from leap_dist.export.onnx import onnx_runner
from leap_dist.export.shrunk import Models
from leap_dist.run_folder import read_run
from tests.export.runs import classifier, language_model, make_run, structure_masks

INT8 = onnx.TensorProto.INT8
WIDE = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 1, "num_labels": 2}


def test_onnx_in_8_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(latency, "MAX_ROUNDS", 1)
    monkeypatch.setattr(metric, "LONGEST", 0.1)
    model = classifier(**WIDE)
    alive = torch.arange(512) % 4 == 0
    up, down = (f"bert.encoder.layer.0.{part}.dense.weight" for part in ("intermediate", "output"))
    masks = {up: alive[:, None].expand(512, 128).clone(), down: alive.expand(128, 512).clone()}
    masks |= {"bert.encoder.layer.0.intermediate.dense.bias": alive.clone()}
    run = read_run(make_run(tmp_path / "run", model, masks, "neuron"))
    (small,) = export_run(run, ["int8"], tmp_path / "out", threads=1)
    assert small.bytes.after < 0.35 * small.bytes.before and small.latency[0].engine == "onnxruntime"
    said = re.findall(r"int8: (.*) \((\d+)% done", capsys.readouterr().err)
    shares = {text: int(share) for text, share in said}
    compared = [f"comparing onnxruntime{bits} with torch" for bits in ("", " in 8 bits")]
    assert shares["writing the ONNX file"] < 5 and all(shares[text] > 60 for text in compared)
    assert shares["quantising the ONNX file"] + 10 < shares[compared[1]] < 100
    judged = small.judged
    assert judged is not None and metric.FEWEST <= judged.examples < judged.of == 4644
    assert judged.before["loss"] != judged.after["loss"] == pytest.approx(judged.before["loss"], abs=0.1)
    assert f"On {judged.examples:,} of 4,644 validation examples, in fp32 → here: accuracy " in small.page()
    ids = torch.arange(1, 13)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    file = tmp_path / "out" / "int8" / "model.onnx"
    matrices = [onnx.numpy_helper.to_array(w) for w in onnx.load(file).graph.initializer if w.data_type == INT8]
    assert len(matrices) >= 7 and all(abs(matrix.astype(int)).max() <= 64 for matrix in matrices if matrix.ndim == 2)
    found, expected = onnx_runner(file, 1)(inputs), torch_runner(model)(inputs)
    assert 0 < float((found - expected).abs().max() / expected.abs().max()) < 0.3


@pytest.mark.skipif(find_spec("torchao") is None, reason="needs the int8 extra")
def test_torch_in_8_bits_loads_without_this_package(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = classifier("llama", hidden_size=128, intermediate_size=256, num_labels=2)
    alive, masks = torch.arange(256) % 2 == 0, {}
    for layer in range(2):
        place = f"model.layers.{layer}.mlp."
        masks |= {f"{place}{part}_proj.weight": alive[:, None].expand(256, 128).clone() for part in ("gate", "up")}
        masks[f"{place}down_proj.weight"] = alive.expand(128, 256).clone()
    run = read_run(make_run(tmp_path / "run", model, masks, "neuron"))
    small, quantised = export_run(run, ["shrunk", "int8_torch"], tmp_path / "out", threads=1, latency=False)
    assert quantised.bytes.after < 0.5 * small.bytes.after
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "int8_torch").eval()
    assert loaded.config.intermediate_size == 128
    ids = torch.arange(1, 13)[None]
    with torch.inference_mode():
        found, expected = loaded(ids).logits, model(ids).logits
    assert 0 < float((found - expected).abs().max() / expected.abs().max()) < 0.1


@pytest.mark.skipif(find_spec("torchao") is None, reason="needs the int8 extra")
def test_settings_of_generation_stay(tmp_path: Path) -> None:
    settings = {"eos_token_id": [2, 7], "temperature": 0.5, "do_sample": True, "max_new_tokens": 9}
    model = language_model()
    model.generation_config.update(**settings)
    run = read_run(make_run(tmp_path / "run", model, {}))
    folder = tmp_path / "small"
    Models(run).save_shrunk(folder)
    assert settings.items() <= int8.save_int8_torch(folder).generation_config.to_dict().items()
    assert settings.items() <= json.loads((folder / "generation_config.json").read_text("utf-8")).items()


def test_data_that_is_gone(tmp_path: Path) -> None:
    model = classifier()
    run = read_run(make_run(tmp_path / "run", model, structure_masks(model), "head"))
    runner = torch_runner(model)
    gone = {"task": "glue/sst2", "train": "gone.tsv", "validation": "gone.tsv"}
    other = replace(run, job=run.job | {"data": gone})
    assert str(metric.judge(Models(other), runner)).startswith("the run's data cannot be read: data.")
    assert metric.judge(Models(replace(run, plain=True)), runner) == "no run says by which task"


def test_what_is_not_installed_or_has_no_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = classifier()
    run = read_run(make_run(tmp_path / "run", model, structure_masks(model), "head"))
    monkeypatch.setattr(int8, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'^--to int8_torch: torchao not installed; .* pip install -e "\.\[int8\]"$'):
        list(export_run(run, ["int8_torch"], tmp_path / "out", threads=1))
    monkeypatch.setattr(int8, "find_spec", lambda name: name)
    with pytest.raises(UserError, match=r"^--to int8_torch: no config of transformers describes .*uniform.*take int8$"):
        list(export_run(run, ["shrunk", "int8_torch"], tmp_path / "out", threads=1))
    assert not (tmp_path / "out").exists()
