"""What README and docs say can be done is done here, word for word as far as a test has time.

Every command, in a block or in a line of text: its options are parsed by the launcher itself, and the job or sweep
that it names is read and checked. Jobs in blocks are run, with fewer steps; so are --import-compression and the
comparison of what they leave. JSON blocks are validated, Python blocks are run on two ranks with fewer steps. Exports,
benchmarks and sweeps are run by tests/launch and tests/sweep, the installation by .ci/run. No test builds an
image or starts a container, as that needs an engine. A command of a kind that this file does not know fails.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from leap_dist.config.job_file import load_job, parse_job, parse_section
from leap_dist.config.sections import SECTIONS
from leap_dist.sweep.sweep_file import read_sweep, trials_of
from tests.export.runs import language_model
from tests.launch.scripts import load_script
from tests.pages import PAGES, README, ROOT, Page, as_launcher, as_object
from tests.ranks import RankPools

pytestmark = pytest.mark.slow

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
FEW_STEPS = ["train.epochs=null", "train.max_steps=20", "train.log_every=10", "train.eval_batch_size=1024"]
COMMANDS = list(dict.fromkeys(command for page in PAGES for command in page.commands()))
LAUNCHES = [launch for page in PAGES for launch in map(as_launcher, page.commands_of_blocks()) if launch is not None]


def jobs_in(page: Page) -> list[dict[str, Any]]:
    """The whole jobs of a page."""
    return [job for block in page.blocks("json") if "data" in (job := as_object(block))]


OLD = {"compression_training": {"sparse_pruning": {"shared_parameters": {"enabled": True, "method": "topk"}}}}
OLD["compression_training"]["sparse_pruning"]["different_groups"] = {  # type: ignore[assignment]
    "sp1": {"params": {"dense_ratio": 0.1}, "modules": ["*"]}
}


def make_model(folder: Path) -> None:
    """A small BERT and its vocabulary."""
    from transformers import AutoModelForSequenceClassification, BertConfig

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=8, **sizes)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words), "utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """Where a reader would stand: a checkout, with the files of the examples."""
    place = tmp_path_factory.mktemp("checkout")
    shutil.copy(empty_store, place / "mlflow.db")
    (place / "configs").symlink_to(ROOT / "configs")
    (job,) = jobs_in(README)
    make_model(place / job["model"]["name"])
    for split in ("train", "validation"):
        (place / job["data"][split]).write_text("sentence,label\n" + "good film,1\nbad film,0\n" * 50, "utf-8")
    (place / "my_job.json").write_text(json.dumps(job), "utf-8")
    (place / "old_ds_config.json").write_text(json.dumps(OLD), "utf-8")
    return place


# ------------------------------------------------------------------------------ every command is understood


def parsed(name: str, words: list[str]) -> Any:
    """What a launcher makes of its arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *words])
        return load_script(name).parse_arguments()


def check_launcher(name: str, words: list[str]) -> None:
    """The options exist, and the file that is named is right."""
    arguments = parsed(name, words)
    if name == "prune" and arguments.config:
        load_job(arguments.config, arguments.set)
    elif name == "sweep" and arguments.config.is_file():
        read_sweep(arguments.config)


def check_extras(match: re.Match[str]) -> None:
    assert set(match[1].split(",")) <= PROJECT["optional-dependencies"].keys()


def check_compose(match: re.Match[str]) -> None:
    words = shlex.split(match[1])
    files = [ROOT / after for word, after in itertools.pairwise(words) if word in ("-f", "--file")]
    services = yaml.safe_load(files[0].read_text("utf-8"))["services"]
    assert all(file.is_file() for file in files)
    assert words[-1] in {*services, "--detach"}


def check_file(match: re.Match[str]) -> None:
    assert (ROOT / match[1]).is_file()


def check_completion(match: re.Match[str]) -> None:
    assert set(match[1].split()) <= PROJECT["scripts"].keys()


def check_tests(match: re.Match[str]) -> None:
    assert (ROOT / (match[1].replace(".", "/") + ".py")).is_file()


OTHERS: dict[str, Callable[[re.Match[str]], None]] = {
    r"(?:python -m |python3 -m )?pip install -e '?\"?\.\[(.+?)\]'?\"?": check_extras,
    r"(?:\w+=\S+ )*docker compose (.+)": check_compose,
    r"docker build .*-f (\S+) .*": check_file,
    r"docker run .*": lambda match: None,
    r"mlflow server --backend-store-uri sqlite:///\S+ --artifacts-destination \S+": lambda match: None,
    r"mlflow models serve -m models:/\S+ --env-manager local --port \d+": lambda match: None,
    r"curl http://127\.0\.0\.1:\d+/invocations .*": lambda match: None,  # both: tests/tracking/test_registry.py
    r"sbatch .*?(docker/\S+) .*": check_file,
    r"kubectl apply -f (\S+)": check_file,
    r"(?:sudo )?(tests/\S+\.sh) .*": check_file,
    r'eval "\$\(register-python-argcomplete (.+)\)"': check_completion,
    r"python -m (tests\.bench\.\w+).*": check_tests,
    r"python (docs/make\.py)": check_file,
    r"python3 -m venv \.venv|\. \.venv/bin/activate": lambda match: None,
    r"python -m pytest( -q -m \"\" -n 3 --dist loadfile)?": lambda match: None,
    r"deepspeed (?:--\S+ \d+ )?\w+\.py": lambda match: None,  # a Python block
    r"pip install lm-eval|lm_eval --model hf .*": lambda match: None,  # not installed here: docs/recovery.md
    r"pip install argcomplete|pip install \S+\.whl|pip wheel .*": lambda match: None,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    launcher = as_launcher(command)
    if launcher is not None and "register-python-argcomplete" not in command:
        check_launcher(*launcher)
        return
    known = [(match, check) for pattern, check in OTHERS.items() if (match := re.fullmatch(pattern, command))]
    assert known, f"{command!r} is of no kind that {Path(__file__).name} knows; add how it is tested"
    known[0][1](known[0][0])


# ------------------------------------------------------------------------------ what is run


def run_short(folder: str, config: str, overrides: list[str], output: str) -> None:
    """A job of the README, with fewer steps."""
    import torch

    from leap_dist.train.loop import run_job
    from leap_dist.zero.ranks import Ranks

    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    with contextlib.chdir(folder):
        job = load_job(config, [*overrides, *FEW_STEPS])
        run_job(job, Path(output), False, Ranks(rank, world, torch.device("cpu")))


def test_the_jobs_run_and_can_be_compared(ranks: RankPools, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    jobs: dict[str, Any] = {}
    for name, words in LAUNCHES:
        if name == "prune" and (arguments := parsed(name, words)).config and arguments.plan is None:
            jobs.setdefault(f"{arguments.config} {arguments.set}", arguments)
    assert len(jobs) >= 3
    for number, arguments in enumerate(jobs.values()):
        ranks(1).run(run_short, str(folder), arguments.config, arguments.set, f"runs/{number}")
        certificate = json.loads((folder / f"runs/{number}/certificate.json").read_text("utf-8"))
        target = load_job(arguments.config, arguments.set).leap.target
        assert abs(certificate["kept"] - target * certificate["prunable"]) <= certificate["unit"]
    command = next(words for name, words in LAUNCHES if name == "compare" and "--pareto" in words)
    monkeypatch.setattr(sys, "argv", ["compare", *command])
    assert load_script("compare").main() == 0
    assert list(folder.glob("*.png"))


def test_an_old_config_is_imported(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(folder / "old_ds_config.json", tmp_path)
    found = [words for name, words in LAUNCHES if "--import-compression" in words]
    monkeypatch.setattr(sys, "argv", ["prune", *found[0]])
    assert load_script("prune").main() == 0
    assert json.loads((tmp_path / "my_job.json").read_text("utf-8"))["leap"]["target"] == 0.1


def check_json(block: dict[str, Any], folder: Path) -> None:
    """A job, a sweep, or sections of a job."""
    if "vary" in block:
        file = folder / "file.json"
        file.write_text(json.dumps(block), "utf-8")
        assert trials_of(sweep := read_sweep(file)) or sweep.search == "optuna"  # which names them later
    elif block.keys() <= SECTIONS.keys() and ("data" not in block or len(block) == 1):
        for name, section in block.items():
            parse_section(SECTIONS[name], name, section)
    else:
        parse_job(block, "a page")


@pytest.mark.parametrize(
    ("page", "text"), [(page.name, text) for page in PAGES for text in page.blocks("json")], ids=itertools.count()
)
def test_a_json_block_is_valid(page: str, text: str, tmp_path: Path) -> None:
    check_json(as_object(text), tmp_path)


def run_block(folder: str, text: str) -> dict[str, Any]:
    """A Python block as a script of two ranks; its certificate."""
    from tests.ecosystem.tiny import accelerate_left_behind

    variables: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.chdir(folder), accelerate_left_behind():
        exec(compile(text, "a page", "exec"), variables)
    certificate: dict[str, Any] = variables["certificate"]
    return certificate


LOOPS = [(page.name, text) for page in PAGES for text in page.blocks("python") if "hold_zeros" not in text]


@pytest.mark.parametrize(("page", "text"), LOOPS, ids=itertools.count())
def test_a_python_block_prunes_to_its_target(ranks: RankPools, tmp_path: Path, page: str, text: str) -> None:
    short = re.sub(r"\b1000\b|\b100\b", "40", text)
    target = float(re.findall(r'"target": ([\d.]+)', text)[0])
    first, second = ranks(2).run(run_block, str(tmp_path), short)
    assert abs(first["kept"] - target * first["prunable"]) <= first["unit"]
    assert first["masks_sha256"] == second["masks_sha256"]


def test_the_block_that_recovers_keeps_the_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    (text,) = (text for page in PAGES for text in page.blocks("python") if "hold_zeros" in text)
    monkeypatch.chdir(tmp_path)
    model = language_model()
    model.model.layers[0].mlp.down_proj.weight.data[:, ::2] = 0.0
    model.save_pretrained("outputs/run/model")
    variables: dict[str, Any] = {}
    exec(compile(text.replace("range(100)", "range(3)"), "a page", "exec"), variables)
    recovered = AutoModelForCausalLM.from_pretrained("outputs/recovered").model.layers[0].mlp.down_proj.weight
    assert variables["zeros"] == int((recovered == 0).sum()) == recovered.numel() // 2
