"""What an error shows, and what it keeps to itself."""

from __future__ import annotations

import base64
import html
import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

from leap_dist.config.job_file import parse_job
from leap_dist.errors import UserError
from leap_dist.secrets import hide_secrets, must_quote

ROOT = Path(__file__).resolve().parents[1]
SECRETS = {
    "postgresql://user:secret@host/db": "postgresql://***@host/db",
    "postgresql://user:se/cr:et@host/db": "postgresql://***@host/db",
    "see http://token@host:80/x and s3://key:id@bucket/y": "see http://***@host:80/x and s3://***@bucket/y",
    "https://host/api?a=b&access_token=secret&c=d": "https://host/api?a=b&access_token=***&c=d",
    "https://host?Password=secret": "https://host?Password=***",
    "sqlite:///a@b.db": "sqlite:///a@b.db",
    "https://host/path?page=2": "https://host/path?page=2",
}


@pytest.mark.parametrize(("text", "shown"), SECRETS.items())
def test_addresses_are_shown_without_secrets(text: str, shown: str) -> None:
    assert hide_secrets(text) == shown
    assert str(UserError(f"tracking: {text}, no")) == f"tracking: {shown}, no"


def test_a_job_file_with_a_mistake_tells_no_secret() -> None:
    uri = f"http://{'u' * 60}:secret@host"
    with pytest.raises(UserError, match=r"tracking\.mlflow_url: got \"http://\*\*\*@host\", unknown key") as caught:
        parse_job({"leap": {"target": 0.5}, "tracking": {"mlflow_url": uri}})
    assert "secret" not in str(caught.value) and "uuu" not in str(caught.value)


NASTY = [
    "p@ssw0rd-tail",
    "two@ats@in-it",
    "with some spaces",
    "comma,inside,it",
    "semi;colon;inside",
    "hash#inside#it",
    "slash/inside/it",
    "percent%inside%41",
    "ünïcödé-秘密-пароль",
    "\"double\" 'single' quotes",
    "question?mark=x&y=z",
    "colon:inside:it",
    "back\\slash\\inside",
    "[brackets]{braces}",
    "<b>markup</b>&amp;",
    "$HOME`id`|pipe",
    "plus+plus+plus==",
    "tab\tinside-it",
    "://scheme://inside@",
    "s3cret",
    "%40%2F%23-quoted",
    "trailing-at@",
]


@pytest.mark.parametrize("password", NASTY)
def test_no_form_of_a_password_is_shown(password: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leap_dist.secrets._remembered", {})
    for address in (f"postgresql+psycopg2://user:{password}@host:5432/db", f"http://user:{quote(password)}@host/x"):
        assert password not in hide_secrets(address) and quote(password) not in hide_secrets(address)
        assert "@host" in hide_secrets(address)
        with pytest.raises(UserError) as caught:
            parse_job({"leap": {"target": 0.5}, "tracking": {"mlflow_url": address}})
        assert password not in str(caught.value) and quote(password) not in str(caught.value)
        for text in others_words(password):
            shown = hide_secrets(f"it failed: {text}.")
            assert shown.startswith("it failed: ") and "***" in shown
            assert password not in shown and quote(password, safe="") not in shown


def others_words(password: str) -> list[str]:
    """A password as other libraries quote it."""
    return [
        f"wrong password '{password}'",
        f"cannot connect to host {password.rpartition('@')[2]}@host" if "@" in password[:-1] else password,
        json.dumps({"password": password}),
        repr(password),
        f"GET /?user=u&p={quote(password, safe='')}",
        f"{{'Authorization': 'Basic {base64.b64encode(f'user:{password}'.encode()).decode()}'}}",
        html.escape(password),
    ]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://hub/x?token=ab,cd;ef gh", "https://hub/x?token=***"),
        ("s3://b/k?X-Amz-Signature=abc&X-Amz-Credential=AKIA/x&list=2", "s3://b/k?X-Amz-Signature=***&X-Amz-Credential=***&list=2"),
        ("sent Authorization: Bearer abc.def-ghi, got 401", "sent Authorization: ***, got 401"),
        ("{'authorization': 'Basic dXNlcjpwdw=='}", "{'authorization': ***}"),
        ("no access with hf_abcdefghijklmnopqrstuvwxyz", "no access with ***"),
        ("https://host/path?page=2", "https://host/path?page=2"),
        ("https://host/path@v2", "https://host/path@v2"),
    ],
)  # fmt: skip
def test_tokens_are_hidden(text: str, shown: str) -> None:
    assert hide_secrets(text) == shown


def test_secrets_of_the_environment_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "from the environment, #1")
    monkeypatch.setenv("HF_TOKEN", "token-of-the-hub")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:of-the-proxy@proxy:80")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    said = hide_secrets(
        "false: from the environment, #1; token-of-the-hub; of-the-proxy; from%20the%20environment%2C%20%231"
    )
    assert said == "false: ***; ***; ***; ***"


def test_a_variable_that_another_thread_removes_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AAA", "removed")
    monkeypatch.setenv("HF_TOKEN", "token-of-the-hub")

    class Removed(type(os.environ)):  # type: ignore[misc]
        def __getitem__(self, name: str) -> str:  # as MLflow's thread does, that tells of its use
            if name == "AAA":
                raise KeyError(name)
            return str(super().__getitem__(name))

    monkeypatch.setattr(os.environ, "__class__", Removed)
    assert hide_secrets("with token-of-the-hub") == "with ***"


def test_control_characters_are_shown_as_escapes() -> None:
    assert str(UserError("a\x1b[31mred\x07\x9b2J \u202eabc\r\n\tb")) == r"a\x1b[31mred\x07\x9b2J \u202eabc\r" + "\n\tb"


def test_what_is_printed_is_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    from leap_dist.console import console, summary_table

    console.cache_clear()
    summary_table([{"run\x1b]0;title\x07": "name\x1b[2J"}], title="\x1b[31mtitle")
    console().print("line\x1b[2J", markup=False)
    console.cache_clear()
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and r"name\x1b[2J" in out and r"line\x1b[2J" in out


WHOLE = {
    "train_micro_batch_size_per_gpu": 2,
    "model": {"name": "a"},
    "data": {"task": "builtin/clock"},
    "train": {"max_steps": 30},
    "leap": {"target": 0.5},
}
AMBIGUOUS = {
    "postgresql+psycopg2://user:p@tail-of-it@host/db": "write %40 for '@'",
    "mysql://user:two@tail@of-it@host/db": "write %40 for '@'",
    "postgresql://user:p@host/db?options=tail@of-it": "write %40 for '@'",
    "http://user:p/tail-of-it@host": "write %2F for '/'",
    "https://user:p#tail?of-it@host:80/x": "write %23 for '#', %3F for '?'",
    "http://user:tail\\of-it@host": "write %5C for ",
    "http://user:tail\nof-it@host": "write %0A for ",
}


@pytest.mark.parametrize(("uri", "remedy"), AMBIGUOUS.items())
def test_an_address_that_clients_read_in_two_ways_is_refused(
    uri: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError) as caught:
        parse_job({"leap": {"target": 0.5}, "tracking": {"mlflow_uri": uri}})
    assert "tracking.mlflow_uri: got" in str(caught.value) and remedy in str(caught.value)
    assert "tail" not in str(caught.value) and "of-it" not in str(caught.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match="mlflow_uri: got"):
        parse_job(WHOLE)


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:////home/a:b@c/x.db",
        "postgresql://user:p%40ss/with?all#of-it@host/db",
        "http://user:p@ss@host:5000/x",
        "https://[::1]:5000",
        "databricks://profile",
        "file:///a@b:c",
    ],
)
def test_an_address_that_is_read_in_one_way_is_taken(uri: str) -> None:
    assert must_quote(uri) == ""


@pytest.mark.parametrize("option", ["--output", "--config"])
def test_a_path_that_no_file_system_takes_is_one_message(option: str, tmp_path: Path) -> None:
    options = {"--config": "configs/ds_leap.json", "--output": str(tmp_path / "run")} | {option: "a" * 300}
    command = [sys.executable, "launch/prune.py", *(part for pair in options.items() for part in pair)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    assert "aaa" in done.stderr and ": File name too long; give a path that can be used" in done.stderr
    assert "Traceback" not in done.stderr
