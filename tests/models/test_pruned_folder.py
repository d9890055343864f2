"""The folder of a pruned model: complete or not there, and refused where anything in it is wrong."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from leap_dist.errors import UserError
from leap_dist.models.blocks import find_structures
from leap_dist.models.pruned_folder import as_stock, load_pruned, save_pruned, save_shrunk
from leap_dist.models.pruned_json import PrunedJson, describe_file
from tests.models.tiny import mask_some_, mask_units_, save_masked, tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pruned T5."""
    model = tiny("t5")
    mask_some_(model)
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_masked(model, folder, extra={"note": [1, None]})
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to damage."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit(folder: Path, change: Any, name: str = "pruned.json") -> None:
    """Apply `change` to the JSON object in a file."""
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def test_the_manifest_says_what_is_left(saved: Path) -> None:
    content = json.loads((saved / "pruned.json").read_text())
    assert set(content) == set(PrunedJson.model_fields)
    assert (content["model_class"], content["stock"], content["extra"]) == ("T5Model", False, {"note": [1, None]})
    assert content["structures"][0]["num_units"] == 4
    assert not list(saved.parent.glob(".*"))


def test_an_older_export_is_replaced_and_a_foreign_folder_is_not(tmp_path: Path) -> None:
    model = tiny("bert")
    for _ in range(2):
        save_masked(model, tmp_path / "model")
    assert not [path for path in tmp_path.iterdir() if path.name != "model"]
    (tmp_path / "other").mkdir()
    with pytest.raises(
        UserError, match=r"other: exists and holds no pruned model; remove it, or choose another folder"
    ):
        save_masked(model, tmp_path / "other")


@pytest.mark.parametrize("stock", [True, False])
def test_settings_of_generation_stay(stock: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    settings = {"eos_token_id": [2, 7], "temperature": 0.5, "do_sample": True, "max_new_tokens": 9}
    model = tiny("llama", "AutoModelForCausalLM")
    model.generation_config.update(**settings)
    for number, structure in enumerate(find_structures(model)):
        if structure.kind == "neuron" and (stock or number == 1):
            mask_units_(model, structure, range(4))
    manifest, _ = save_masked(model, tmp_path / "small")
    assert manifest.stock == stock
    pruned = load_pruned(tmp_path / "small")
    save_pruned(pruned, tmp_path / "again", like=tmp_path / "small")
    found: list[Any] = [pruned, load_pruned(tmp_path / "again")]
    if stock:
        whole = {structure.name: range(structure.num_units) for structure in find_structures(model)}
        found += [as_stock(model, whole), AutoModelForCausalLM.from_pretrained(tmp_path / "small")]
    for each in found:
        assert settings.items() <= each.generation_config.to_dict().items()


def test_units_that_are_not_those_of_the_model_are_refused(tmp_path: Path) -> None:
    model = tiny("bert")
    kept = mask_some_(model)
    with pytest.raises(UserError, match=r"model: BertModel is not what its config describes less the units that left"):
        save_shrunk(model, kept, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def set_key(*path: Any, to: Any) -> Any:
    """A change that sets one value deep inside."""

    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to

    return change


def rename_file(name: str) -> Any:
    def change(content: Any) -> None:
        content["files"] = {name: content["files"]["model.safetensors"]}

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (set_key("format", to=2), r"pruned\.json: damaged: format: Input should be 1; export it again"),
        (set_key("stock", to="yes"), r"damaged: stock: Input should be a valid boolean"),
        (set_key("unknown", to=1), r"damaged: unknown: "),
        (set_key("structures", 0, "kept", to=[2, 1]), r"SelfAttention: kept units must ascend and lie in 0\.\.3"),
        (set_key("structures", 0, "kept", to=[1, 1]), r"kept units must ascend"),
        (set_key("structures", 0, "kept", to=[1, 4]), r"kept units must ascend and lie in 0\.\.3"),
        (set_key("structures", 0, "kept", to=[-1]), r"kept units must ascend"),
        (set_key("structures", 0, "kept", to=["1"]), r"damaged: structures\.0\.kept\.0: Input should be a valid int"),
        (set_key("structures", 0, "kept", to=[]), r"must keep a unit: other layers need this block"),
        (set_key("structures", 0, "kept", to=[0]), r"weights do not fit config\.json and pruned\.json: .* shape"),
        (set_key("structures", 0, "num_units", to=5), r"got 5 units; config\.json gives it 4"),
        (set_key("structures", 0, "name", to="encoder.block.9"), r"encoder\.block\.9: the model has no such structure"),
        (lambda content: content["structures"].pop(), r"DenseReluDense: is missing from structures"),
        (set_key("model_class", to="os"), r"model_class: got 'os'; allowed: a model class of transformers 5"),
        (set_key("model_class", to="AutoModel"), r"model_class: got 'AutoModel'"),
        (set_key("model_class", to="BertModel"), r"the model has no such structure"),
        (rename_file("../model.safetensors"), r"got file '\.\./model\.safetensors'; allowed: a \*\.saf"),
        (rename_file("model.bin"), r"got file 'model\.bin'"),
        (rename_file("other.safetensors"), r"other\.safetensors: there is no such file, but pruned\.json names it"),
        (set_key("files", to={}), r"config\.json: num_\w*layers: got \d+; the weight files hold 0 tensors"),
        (set_key("files", "model.safetensors", "size", to=1), r"is not the file that was exported"),
        (set_key("files", "model.safetensors", "sha256", to="0" * 64), r"is not the file that was exported"),
    ],
)
def test_a_damaged_manifest_is_refused(folder: Path, change: Any, match: str) -> None:
    edit(folder, change)
    with pytest.raises(UserError, match=match):
        load_pruned(folder)


def test_a_folder_that_is_none_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none: there is no such folder"):
        load_pruned(tmp_path / "none")
    (folder / "pruned.json").write_text("{")
    with pytest.raises(UserError, match=r"pruned\.json: damaged: not JSON: line 1, column 2: .*; export it again"):
        load_pruned(folder)
    (folder / "pruned.json").unlink()
    with pytest.raises(
        UserError, match=r"holds no pruned model: it has no pruned\.json; give a folder that an export made"
    ):
        load_pruned(folder)


def test_a_damaged_config_is_refused(folder: Path) -> None:
    edit(folder, set_key("d_model", to="wide"), "config.json")
    with pytest.raises(UserError, match=r"config\.json: transformers refuses it: "):
        load_pruned(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json; copy the whole folder"):
        load_pruned(folder)


def test_damaged_weights_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"abcd")
    with pytest.raises(
        UserError, match=r"model\.safetensors: is not the file that was exported \(size or SHA-256 differ\)"
    ):
        load_pruned(folder)
    file.write_bytes(b"no weights")
    edit(folder, set_key("files", "model.safetensors", to=describe_file(file).model_dump()))
    with pytest.raises(UserError, match=r"model\.safetensors: is not a safetensors file"):
        load_pruned(folder)


def test_a_weight_that_is_not_the_models_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"extra.weight": torch.ones(1)}, file)
    edit(folder, set_key("files", "model.safetensors", to=describe_file(file).model_dump()))
    with pytest.raises(UserError, match=r"pruned\.json: extra\.weight is not the model's"):
        load_pruned(folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            set_key("num_layers", to=10**8),
            r"config\.json: num_layers: got 100000000; the weight files hold \d+ tensors",
        ),
        (set_key("num_decoder_layers", to=10**30), r"config\.json: damaged: got 10{30}; allowed: integers of 64 bits"),
        (set_key("deep", "vision", to={"num_layers": 10**8}), r"config\.json: deep\.vision\.num_layers: got 10{8}; "),
    ],
)
def test_a_config_with_more_layers_than_tensors_is_refused_before_it_is_built(
    folder: Path, change: Any, match: str
) -> None:
    edit(folder, lambda content: content.update(deep={}), "config.json")
    edit(folder, change, "config.json")
    with pytest.raises(UserError, match=match):
        load_pruned(folder)


@pytest.mark.parametrize("name", ["config.json", "pruned.json"])
def test_a_deep_or_huge_description_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text("[" * 200_000)
    with pytest.raises(UserError, match=rf"{name}: damaged: "):
        load_pruned(folder)
    with (folder / name).open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match=rf"{name}: damaged: has 1099511627776 bytes; allowed: at most 16777216"):
        load_pruned(folder)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("d_model", 2**40, r"config\.json: transformers refuses it: |has another shape"),
        ("vocab_size", 2**34, r"weights do not fit config\.json and pruned\.json: \S+ has another shape"),
        ("d_ff", 2**34, r"got \d+ units; config\.json gives it 17179869184"),
    ],
)
def test_a_config_of_huge_widths_takes_no_memory(folder: Path, key: str, value: int, match: str) -> None:
    """What it describes is compared with the weights before any of it is made."""
    edit(folder, lambda content: content.update({key: value}), "config.json")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=match):
        load_pruned(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # kB
