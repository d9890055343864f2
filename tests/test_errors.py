"""What an error shows, and what it keeps to itself."""

from __future__ import annotations

import pytest

from leap_dist.config.job_file import parse_job
from leap_dist.errors import UserError, hide_secrets

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
