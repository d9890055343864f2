"""launch/prune.py as a user starts it: what it refuses, and what a finished run leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.launch.scripts import load_script
from tests.ranks import RankPools
from tests.tracking.folders import Page

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "prune.py"
BINARIES = Path(sys.executable).parent
STEPS = 30

MODEL: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 21,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
JOB: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 8,
    "model": {"from_config": MODEL},
    "data": {"task": "builtin/clock"},
    "train": {"max_steps": STEPS, "learning_rate": 1e-3, "eval_batch_size": 512},
    "leap": {"target": 0.3},
    "tracking": {"mlflow_uri": None},
}


def write_job(folder: Path, **changes: Any) -> Path:
    """JOB with other sections, as a file of its own."""
    file = folder / "job.json"
    file.write_text(json.dumps(JOB | changes), "utf-8")
    return file


def start(command: list[str], folder: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder`, as in a fresh shell with the environment activated."""
    path = os.pathsep.join([str(BINARIES), os.environ.get("PATH", os.defpath)])
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = kept | {"PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)


def prune(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One process, without a launcher."""
    return start([sys.executable, str(SCRIPT), *arguments], folder)


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Two ranks, by DeepSpeed's launcher."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(port), str(SCRIPT), *arguments]
    return start([str(BINARIES / command[0]), *command[1:]], folder)


def check_refused(run: subprocess.CompletedProcess[str], message: str) -> None:
    """Exit code 2, and on stderr the one message."""
    assert run.returncode == 2, run.stderr
    assert run.stderr.count("error: ") == 1 and run.stderr.startswith("error: "), run.stderr
    assert message in run.stderr
    assert "Traceback" not in run.stdout + run.stderr


# ------------------------------------------------------------------------------ mistakes in the job file


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("leap.targett=0.1", "leap.targett: got 0.1, unknown key; allowed: target, "),
        ("lepa.target=0.1", "did you mean leap?"),
        ("train.max_steps=many", 'train.max_steps: got "many"; allowed: an integer >= 10'),
        ("leap.target=0", "leap.target: got 0; allowed: a number, 0 < target <= 1"),
        ("leap.target=1.5", "leap.target: got 1.5; allowed: a number, 0 < target <= 1"),
        ("leap.target=ten", 'leap.target: got "ten"; allowed: a number, 0 < target <= 1'),
        ("leap.gates=blocks:4x4", 'leap.gates[0]: got "blocks:4x4"; allowed: one or more of element, row, '),
        ("zero_optimization.stage=5", "zero_optimization.stage: got 5; allowed: 0, 1, 2 or 3"),
    ],
)
def test_a_mistake_in_the_job_is_one_message(tmp_path: Path, override: str, message: str) -> None:
    file = write_job(tmp_path, tracking={"mlflow_uri": "sqlite:///mlflow.db"})
    run = prune(tmp_path, "--config", str(file), "--set", override, "--output", "run")
    check_refused(run, message)
    assert f"{file}: 1 problem\n  " in run.stderr
    assert run.stdout == ""
    assert list(tmp_path.iterdir()) == [file]


def test_a_missing_job_file_is_one_message(tmp_path: Path) -> None:
    run = prune(tmp_path, "--config", "ds_lepa.json")
    check_refused(run, "config: no file ds_lepa.json; looked for ")
    assert "did you mean ds_leap.json?" in run.stderr
    assert not list(tmp_path.iterdir())


def test_without_a_job_file_the_usage_is_shown(tmp_path: Path) -> None:
    run = prune(tmp_path)
    assert run.returncode == 2
    assert run.stderr.startswith("usage: ") and "--config" in run.stderr


@pytest.fixture
def script() -> ModuleType:
    return load_script("prune")


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_tells_of_a_mistake_before_the_others_end(
    rank: int,
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(script.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(sys, "argv", ["prune.py", "--config", str(tmp_path / "none.json"), f"--local_rank={rank}"])
    assert script.main() == 2
    assert capsys.readouterr().err.startswith("error: config: no file ")
    assert waited == [script.PATIENCE] * rank


# ------------------------------------------------------------------------------ mistakes in data and model


def make_text_model(folder: Path) -> None:
    """A BERT folder with weights, config and a small vocabulary; beside it, one without the weights."""
    from transformers import AutoModelForSequenceClassification, BertConfig

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    sizes = {key: value for key, value in MODEL.items() if key != "model_type"}
    model = AutoModelForSequenceClassification.from_config(BertConfig(**sizes))
    for name in ("model", "bare"):
        (folder / name).mkdir()
        (folder / name / "vocab.txt").write_text("\n".join(words), "utf-8")
        model.config.save_pretrained(folder / name)
    model.save_pretrained(folder / "model")


def text_sections(folder: Path, model: str = "model", train: str = "train.tsv", **data: Any) -> dict[str, Any]:
    files = {"train": str(folder / train), "validation": str(folder / "dev.tsv")}
    return {"model": {"name": str(folder / model)}, "data": {"task": "glue/sst2", "max_length": 16, **files, **data}}


def run_in_rank(job: dict[str, Any], output: str, resume: bool = False) -> str:
    """What `run_job` says of a job that it refuses; "" where it runs to its end."""
    import torch

    from leap_dist.config.job_file import parse_job
    from leap_dist.errors import UserError
    from leap_dist.train.loop import run_job
    from leap_dist.zero.ranks import Ranks

    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    try:
        run_job(parse_job(job), Path(output), resume, Ranks(rank, world, torch.device("cpu")))
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text model, and data files good and bad."""
    folder = tmp_path_factory.mktemp("texts")
    make_text_model(folder)
    rows = "good film\t1\nbad film\t0\n" * 20
    (folder / "train.tsv").write_text(f"sentence\tlabel\n{rows}", "utf-8")
    (folder / "dev.tsv").write_text(f"sentence\tlabel\n{rows}", "utf-8")
    (folder / "empty.tsv").write_text("sentence\tlabel\n", "utf-8")
    (folder / "file").touch()
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"leap": {"target": 0.3, "include": ["re:gpt"]}}, "leap.include: 're:gpt' matches no tensor of the model; "),
        ({"leap": {"target": 0.3, "gates": ["block:17x4"]}}, "leap.gates: 'block:17x4' is larger than bert.encoder"),
        ({"model": "model", "train": "none.tsv"}, "data.train: got {folder}/none.tsv; there is no such file"),
        ({"model": "model", "label": "mood"}, 'data.label: got "mood", which is not a column of {folder}/train.tsv; '),
        ({"model": "model", "train": "empty.tsv"}, "data.train: {folder}/empty.tsv: no examples in it"),
        ({"model": "bare"}, 'model.name: got "{folder}/bare"; that folder has no weights (*.safetensors or '),
        ({"model": "none"}, 'model.name: got "{folder}/none"; there is no such folder'),
        ({"train_micro_batch_size_per_gpu": 10**6}, "data.train: 41580 examples do not fill one step of 1000000 "),
        ({"gradient_accumulation_steps": "two"}, "gradient_accumulation_steps: got 'two'; allowed: an integer >= 1"),
        ({"train_batch_size": 0}, "train_batch_size: got 0; allowed: an integer >= 1"),
        ({"zero_optimization": {"stge": 2}}, "DeepSpeedZeroConfig.stge: got 2; DeepSpeed says: Extra inputs are not "),
        ({"train": {"epochs": 0.001}}, "train.epochs: got 0.001; 5 optimizer steps are too few for three phases; "),
        (
            {"train": {"epochs": 0.01}, "leap": {"target": 0.3, "total_steps": 20}},
            "leap.total_steps: got 20; train.epochs: 0.01 is 52 steps of these data; allowed: that number, or null",
        ),
    ],
)
def test_a_mistake_beside_the_job_file_is_one_message(
    ranks: RankPools, texts: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    if isinstance(changes.get("model"), str):
        changes = text_sections(texts, **changes)
    job = JOB | {"tracking": {"mlflow_uri": f"sqlite:///{tmp_path}/mlflow.db"}} | changes
    refused = ranks(1).run(run_in_rank, job, str(tmp_path / "run"))[0]
    assert refused.startswith(message.format(folder=texts)), refused
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_made_is_refused(ranks: RankPools, texts: Path, tmp_path: Path) -> None:
    for output in (texts, texts / "file"):
        refused = ranks(1).run(run_in_rank, JOB, str(output))[0]
        assert refused.startswith(f"--output: {output} exists and holds no run of this program; choose another"), output
    refused = ranks(1).run(run_in_rank, JOB, str(texts / "file" / "run"))[0]
    assert refused.endswith(f"run cannot be made: {texts / 'file'} is not a folder that can be written to")
    refused = ranks(1).run(run_in_rank, JOB, str(tmp_path / "run"), True)[0]
    assert refused == f"--resume: there is no unfinished run in {tmp_path / 'run'}; start without --resume"
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ small whole runs


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


def test_a_text_model_is_pruned_on_local_files_and_comes_with_its_tokenizer(
    ranks: RankPools, texts: Path, tmp_path: Path
) -> None:
    job = JOB | text_sections(texts) | {"leap": {"target": 0.5, "gates": "row"}}
    assert ranks(1).run(run_in_rank, job, str(tmp_path / "run"))[0] == ""
    certificate = json.loads((tmp_path / "run" / "certificate.json").read_text("utf-8"))
    assert abs(certificate["kept"] - 0.5 * certificate["prunable"]) <= certificate["unit"] == 24
    assert (tmp_path / "run" / "model" / "tokenizer.json").is_file()
    assert ranks(1).run(run_in_rank, job, str(tmp_path / "run"), True)[0].startswith("--resume: the run in ")


def test_train_batch_size_alone_decides_the_accumulation(ranks: RankPools, tmp_path: Path) -> None:
    assert ranks(1).run(run_in_rank, JOB | {"train_batch_size": 16}, str(tmp_path / "run")) == [""]
    last = read_metrics(tmp_path / "run")[-1]
    assert (last["step"], last["phase"]) == (STEPS, "settle")


LOAD = """
import json, sys
sys.modules["leap_dist"] = None
from transformers import AutoModelForSequenceClassification
model, report = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], output_loading_info=True)
zeros = {name: int((weight == 0).sum()) for name, weight in model.named_parameters()}
print(json.dumps({"zeros": zeros, "labels": model.config.id2label, "odd": [k for k, v in report.items() if v]}))
"""

TENSORS = ["attention.self.key", "attention.self.query", "attention.self.value", "attention.output.dense"]
TENSORS += ["intermediate.dense", "output.dense"]


def check_exact(certificate: dict[str, Any]) -> None:
    """The target is met, by the counts of all tensors."""
    prunable, kept = 4 * 16 * 16 + 2 * 16 * 24, certificate["kept"]
    assert certificate["prunable"] == prunable
    assert abs(kept - certificate["target"] * prunable) <= certificate["unit"] == 1
    assert certificate["density"] == kept / prunable
    assert set(certificate["tensors"]) == {f"bert.encoder.layer.0.{name}.weight" for name in TENSORS}
    assert kept == sum(tensor["kept"] for tensor in certificate["tensors"].values())


def test_a_job_from_end_to_end(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    file = write_job(tmp_path, tracking={"mlflow_uri": uri, "experiment": "end to end", "run_name": "tiny"})
    run = prune(tmp_path, "--config", str(file), "--set", "leap.target=0.25", "--output", "runs/tiny")
    assert run.returncode == 0, run.stderr
    folder = tmp_path / "runs" / "tiny"
    check_output(run.stdout)
    check_run_folder(folder)
    check_loads_without_leap_dist(folder)
    check_tracked(uri, folder)


def check_output(printed: str) -> None:
    assert "step 10/30  prune  loss " in printed and "step 30/30  settle  loss " in printed
    assert "builtin/clock, target density 0.25" in printed
    assert "certificate and model: runs/tiny" in printed


def check_report(folder: Path) -> None:
    page = Page((folder / "report.html").read_text("utf-8"))
    assert page.count["svg"] == 3 and "optimizer step" in page.text and "density 0.25" in page.text
    gates = json.loads((folder / "scores.json").read_text("utf-8"))["gates"]
    certified = json.loads((folder / "certificate.json").read_text("utf-8"))["gates"]
    assert [(gate["name"], sum(gate["kept"])) for gate in gates] == [(g["name"], g["kept_units"]) for g in certified]


def check_run_folder(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "certificate.json",
        "config.json",
        "metrics.jsonl",
        "model",
        "plots",
        "report.html",
        "scores.json",
    ]
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert (config["leap"]["target"], config["leap"]["total_steps"], config["leap"]["rule"]) == (0.25, STEPS, "leap")
    assert config["train_micro_batch_size_per_gpu"] == 8 and config["train"]["seed"] == 17
    metrics = read_metrics(folder)
    assert [line["step"] for line in metrics] == [10, 20, 30]
    assert [line["phase"] for line in metrics] == ["prune", "prune", "settle"]
    assert all({"loss", "lr", "remaining", "level", "density"} <= set(line) for line in metrics)
    assert metrics[-1]["level"] == 0.25
    check_report(folder)
    certificate = json.loads((folder / "certificate.json").read_text("utf-8"))
    expected = {"target", "density", "unit", "kept", "prunable", "metrics", "gates", "tensors"}
    assert set(certificate) == expected | {"masks_sha256", "weights_sha256", "seed", "versions", "sha256"}
    assert set(certificate["metrics"]) == {"dense", "pruned"}
    assert all(set(values) == {"accuracy", "loss"} for values in certificate["metrics"].values())
    assert [gate["granularity"] for gate in certificate["gates"]] == ["element"] * len(TENSORS)
    assert {"leap_dist", "torch", "deepspeed", "transformers", "python"} == set(certificate["versions"])
    assert certificate["seed"] == 17
    check_exact(certificate)


def check_loads_without_leap_dist(folder: Path) -> None:
    loaded = start([sys.executable, "-c", LOAD, str(folder / "model")], folder)
    assert loaded.returncode == 0, loaded.stderr
    answer = json.loads(loaded.stdout.splitlines()[-1])
    assert answer["labels"] == {"0": "before", "1": "after"} and answer["odd"] == []
    for name, tensor in json.loads((folder / "certificate.json").read_text("utf-8"))["tensors"].items():
        assert answer["zeros"][name] == tensor["numel"] - tensor["kept"] + tensor["zeros_kept"]


def check_tracked(uri: str, folder: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("end to end")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "tiny")
    expected = {"leap.target": "0.25", "train.max_steps": "30", "model.from_config.hidden_size": "16"}
    assert expected.items() <= run.data.params.items()
    certificate = json.loads((folder / "certificate.json").read_text("utf-8"))
    for name in ("dense", "pruned"):
        assert run.data.metrics[f"{name}_accuracy"] == pytest.approx(certificate["metrics"][name]["accuracy"])
    counted = {"pruned_density": "density", "kept_weights": "kept", "prunable_weights": "prunable"}
    assert all(run.data.metrics[name] == certificate[key] for name, key in counted.items())
    assert run.data.metrics["leap_ms"] > 0
    tags = {"ranks": "1", "zero_stage": "0", "rule": "leap", "gates": "element", "folder": str(folder)}
    assert {f"leap.{key}": value for key, value in tags.items()}.items() <= run.data.tags.items()
    assert run.data.tags.keys() >= {"leap.commit", "leap.hardware", "leap.metric", "leap.version.deepspeed"}
    losses = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in losses] == [
        (line["step"], line["loss"]) for line in read_metrics(folder)
    ]
    measured = {"mask_flips", "steps_per_second", "tokens_per_second", "memory_mb"}
    assert measured <= run.data.metrics.keys()
    data = [(item.dataset.name, item.tags[0].value) for item in run.inputs.dataset_inputs]
    assert sorted(data) == [("builtin/clock train", "train"), ("builtin/clock validation", "validation")]
    stored = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert stored >= {"certificate.json", "config.json", "gates.json", "plots", "report.html"}


@pytest.mark.long
def test_two_ranks_under_zero_3_and_then_the_same_output_again(ranks: RankPools, tmp_path: Path) -> None:
    file = write_job(tmp_path, zero_optimization={"stage": 3})
    run = launch(tmp_path, "--config", str(file), "--output", "run")
    assert run.returncode == 0, run.stdout + run.stderr
    check_exact(json.loads((tmp_path / "run" / "certificate.json").read_text("utf-8")))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    job = JOB | {"zero_optimization": {"stage": 3}}
    for refused in ranks(2).run(run_in_rank, job, str(tmp_path / "run")):
        assert refused.startswith(f"--output: the run in {tmp_path}/run is finished; its result is in ")
        assert refused.endswith("run/certificate.json; choose another folder, or remove it")
    again = launch(tmp_path, "--config", str(file), "--set", "leap.target=2")
    check_refused(again, "leap.target: got 2; allowed: a number, 0 < target <= 1")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_one_shot_that_was_killed_starts_anew(ranks: RankPools, tmp_path: Path) -> None:
    job, folder = JOB | {"leap": {"target": 0.3, "mode": "one_shot"}}, tmp_path / "run"
    assert ranks(1).run(run_in_rank, job, str(folder)) == [""]
    whole = json.loads((folder / "certificate.json").read_text("utf-8"))
    for path in folder.iterdir():  # what a kill before the cut leaves
        if path.name != "config.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert ranks(1).run(run_in_rank, job, str(folder)) == [""]
    assert json.loads((folder / "certificate.json").read_text("utf-8")) == whole


@pytest.mark.parametrize("name", ["llama3.2_1b", "llama3.2_1b.json", "some/where/llama3.2_1b.json"])
def test_a_run_without_an_output_has_the_name_of_its_config(name: str) -> None:
    assert load_script("prune").default_output(name) == Path("outputs/llama3.2_1b")
