"""Whole runs of launch/prune.py with many secrets: nothing that they leave or print holds one of them, in any form."""

from __future__ import annotations

import html
import json
import os
import shutil
from pathlib import Path
from urllib.parse import quote, quote_plus, urlsplit

import pytest

from tests.launch.test_prune import JOB, prune, write_job
from tests.test_errors import NASTY
from tests.tracking.proxy import proxy
from tests.tracking.servers import Server

pytestmark = pytest.mark.slow

NAMES = (
    *("MLFLOW_TRACKING_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"),
    *("AWS_SESSION_TOKEN", "WANDB_API_KEY", "GITHUB_TOKEN", "PGPASSWORD", "MYSQL_PWD", "SSHPASS", "SERVICE_SECRET"),
)
VARIABLES = {name: f"{text}-{number}zq" for number, (name, text) in enumerate(zip(NAMES, NASTY, strict=False))}
ADDRESSES = {f"a{number}": f"{text}{number}-zq" for number, text in enumerate(NASTY)}
SETTINGS = {"api_key": "key-of-comet-zq", "password": 'pa"ss word-zq', "hub_token": "token, of; the hub-zq"}
OWN = "user:pa@ss@host/#?%&= ,;\"'\\ü-zq=="
PROXY = "pr@x:y/p#w%-zq"
SIGNED, ACCOUNT = "sig/na+ture-zq==", "QWNjb3VudEtleS16cQ=="
SECRETS = [*VARIABLES.values(), *ADDRESSES.values(), *SETTINGS.values(), OWN, PROXY, SIGNED, ACCOUNT]


def forms(secret: str) -> set[bytes]:
    """A secret as files may hold it."""
    texts = {secret, quote(secret, safe=""), quote(secret), quote_plus(secret), repr(secret)[1:-1]}
    texts |= {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], secret.replace("%", "%%")}
    texts |= {json.dumps(json.dumps(secret))[3:-3], html.escape(secret), html.escape(json.dumps(secret)[1:-1])}
    return {text.encode() for text in texts} | {secret.encode("utf-16-le")}


def leaks(texts: dict[str, bytes]) -> list[tuple[str, str]]:
    return [
        (where, secret) for where, text in texts.items() for secret in SECRETS if any(f in text for f in forms(secret))
    ]


def run_with_secrets(folder: Path, uri: str) -> None:
    """A run with every secret above; everything in the folder is searched, and what was printed."""
    used = {name: f"postgresql+psycopg2://u:{quote(text, safe='')}@host/db" for name, text in ADDRESSES.items()}
    job = write_job(
        folder,
        train={**JOB["train"], "checkpoint_every": 20, "log_every": 1},
        tracking={"mlflow_uri": uri, "experiment": f"from {used['a0']}", "run_name": used["a1"]},
        autotuning={"enabled": False, "arg_mappings": used},
        comet={"enabled": False, "api_key": SETTINGS["api_key"], "project": f"https://h/p?sig={SIGNED}"},
    )
    done = prune(folder, "--config", str(job), "--output", "run")
    assert done.returncode == 0, done.stderr
    assert (folder / "run" / "certificate.json").is_file() and not (folder / "run" / "mlflow.jsonl").exists()
    refused = [
        prune(folder, "--config", str(job), "--output", "run"),
        prune(folder, "--config", str(job), "--set", f"model.{'password'}={SETTINGS['password']}"),
        prune(folder, "--config", str(job), "--set", "data=" + json.dumps({"hub_token": SETTINGS["hub_token"]})),
    ]
    assert [again.returncode for again in refused] == [2, 2, 2]
    assert "***" in refused[1].stderr and "***" in refused[2].stderr
    job.unlink()
    files = {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert {"config.json", "certificate.json", "report.html", "metrics.jsonl"} <= {Path(name).name for name in files}
    printed = {
        f"output of call {number}": (run.stdout + run.stderr).encode() for number, run in enumerate([done, *refused])
    }
    assert not leaks(files | printed)
    assert b'"api_key": "***"' in files[str(folder / "run" / "config.json")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, in an environment that is full of secrets."""
    for name, secret in VARIABLES.items():
        monkeypatch.setenv(name, secret)
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://me:{quote(PROXY, safe='')}@127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", f"Protocol=https;AccountName=a;AccountKey={ACCOUNT};Suffix=x")
    return tmp_path


@pytest.mark.long
def test_a_run_with_a_database_keeps_its_secrets(folder: Path, empty_store: Path) -> None:
    shutil.copy(empty_store, folder / "mlflow.db")
    run_with_secrets(folder, f"sqlite:///{folder}/mlflow.db")
    assert (folder / "mlruns").is_dir()


def test_a_run_with_a_server_keeps_its_secrets(folder: Path, empty_store: Path) -> None:
    """The server asks for credentials, and they arrive."""
    store = folder / "server"
    store.mkdir()
    shutil.copy(empty_store, store / "backend.db")
    os.environ.pop("MLFLOW_TRACKING_TOKEN")
    with Server(store) as server, proxy(urlsplit(server.address).port or 0) as locked:
        locked.mode = "locked"
        run_with_secrets(folder, f"http://me:{quote(OWN, safe='')}@{locked.address}")
    assert any((store / "files").rglob("report.html"))
