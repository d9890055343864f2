"""launch/export.py --push-to-hub, with the hub's own client over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from tests.export.hub import TOKEN, HubServer, hub_server
from tests.export.runs import classifier, element_masks, make_run
from tests.launch.test_export import launch


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = classifier()
    return make_run(tmp_path_factory.mktemp("runs") / "run", model, element_masks(model))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A hub that the client finds, and no token but the one in the environment."""
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with hub_server() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        yield server


def push(monkeypatch: pytest.MonkeyPatch, run: Path, output: Path, name: str, kinds: str = "hf") -> int:
    options = ["--to", kinds, "--output", str(output), "--no-latency", "--push-to-hub", name]
    return launch(monkeypatch, "export", str(run), *options)


def test_an_export_goes_to_the_hub_with_its_card(
    hub: HubServer, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(monkeypatch, run, tmp_path, "us/small") == 0
    shown = capsys.readouterr()
    assert shown.out.endswith(f"{hub.address}/us/small\n") and TOKEN not in shown.out + shown.err
    files = hub.repositories["us/small"]
    local = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    assert files == {".gitattributes": b"", **local} and hub.private["us/small"]
    assert json.loads(files["card.json"])["kind"] == "hf"
    assert huggingface_hub.ModelCard(files["README.md"].decode()).data.tags == ["pruning", "leap"]
    assert hub.large, "the weights went as a large file"

    files["stale.bin"] = b"of an older export"
    assert push(monkeypatch, run, tmp_path, "us/small", "mask") == 0
    assert set(files) == {".gitattributes", *(path.name for path in (tmp_path / "mask").iterdir())}


def test_an_upload_that_fails_leaves_no_repository(
    hub: HubServer, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refused = {"/commit/": 403}
    assert push(monkeypatch, run, tmp_path, "me/small", "mask") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"error: --push-to-hub: me/small cannot go to {hub.address}: ")
    assert message.endswith(f"; the export is in {tmp_path / 'mask'}")
    assert not hub.repositories and (tmp_path / "mask" / "card.json").is_file()


FORM = "allowed: OWNER/NAME, a user or an organisation and a new name"


@pytest.mark.parametrize(
    ("name", "kinds", "message"),
    [
        ("small", "hf", f'got "small": no owner; {FORM}'),
        ("", "hf", f"{FORM}"),
        ("me/a/b", "hf", FORM),
        ("me/-a", "hf", FORM),
        ("me/small", "hf,mask", "got --to hf,mask; a repository holds one kind of export: run it once for each"),
        ("you/small", "hf", 'got "you/small"; the token is not of you; allowed: me, us'),
        ("me/other", "hf", "me/other is there and holds no export; choose another name"),
    ],
)
def test_a_name_is_refused_before_anything_is_exported(
    hub: HubServer,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    kinds: str,
    message: str,
) -> None:
    hub.repositories["me/other"] = {"pytorch_model.bin": b""}
    assert push(monkeypatch, run, tmp_path / "out", name, kinds) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: --push-to-hub: ") and message in shown.err and shown.err.count("\n") == 1
    assert not (tmp_path / "out").exists() and not any("create" in asked for asked in hub.asked)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("no token", "no token; set HF_TOKEN to one that may write, or log in with `hf auth login`"),
        ("another token", ": Invalid user token"),
        ("a token to read", "the token of me may only read; make one that may write"),
        ("offline", "HF_HUB_OFFLINE is set; unset it, or leave --push-to-hub out"),
        ("no network", "me/small cannot go to http://127.0.0.1:9: "),
    ],
)
def test_a_hub_that_would_not_take_it_is_one_message(
    hub: HubServer,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    wrong: str,
    message: str,
) -> None:
    secret = "hf_" + "othersecret" * 3
    if wrong == "no token":
        monkeypatch.delenv("HF_TOKEN")
    elif wrong == "another token":
        monkeypatch.setenv("HF_TOKEN", secret)
    elif wrong == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif wrong == "no network":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    hub.role = "read" if wrong == "a token to read" else "write"
    assert push(monkeypatch, run, tmp_path / "out", "me/small") == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: --push-to-hub: ") and message in shown.err and shown.err.count("\n") == 1
    assert TOKEN not in shown.err and secret not in shown.err and not (tmp_path / "out").exists()
