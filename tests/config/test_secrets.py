"""What counts as a secret, and what is masked."""

from __future__ import annotations

from typing import Any

import pytest

from atlas.config.secrets import is_secret, mask_argument, mask_uris, without_credentials


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("data.token", "hf_abc", True),
        ("data.hf_token", "hf_abc", True),
        ("model.own.API_KEY", "abc", True),
        ("+token", "abc", True),
        ("a.access_key_id", "abc", True),
        ("a.password", 1234, True),
        ("a.password", "", False),
        ("a.password", None, False),
        ("token.name", "abc", False),  # the last part is the key's name
        ("model.tokens", 77, False),
        ("model.tokenizer", "bert", False),
        ("model.max_secrets", 3, False),
        ("tracking.uri", "http://me:pa55@host", True),
        ("tracking.uri", "postgresql+psycopg2://me:pw@db/x", True),
        ("tracking.uri", "http://:pw@host", True),
        ("tracking.uri", "http://me@host", False),
        ("tracking.uri", "http://host:80/a@b", False),
        ("tracking.uri", 5, False),
    ],
)
def test_is_secret(key: str, value: Any, expected: bool) -> None:
    assert is_secret(key, value) is expected


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("data.token=abc", "data.token=***"),
        ("+hydra.job.env_set.MLFLOW_TRACKING_PASSWORD=x=y", None),
        ("tracking.uri=http://me:pa55@host/x", "tracking.uri=***"),
        ("http://me:pa55@host/x", "http://***@host/x"),
        ("--config=http://tok@host/x", "--config=http://***@host/x"),
        ("data.token=", "data.token="),
        ("data.token", "data.token"),
        ("trainer.steps=5", "trainer.steps=5"),
    ],
)
def test_mask_argument(argument: str, expected: str | None) -> None:
    assert mask_argument(argument) == (expected or f"{argument.partition('=')[0]}=***")


@pytest.mark.parametrize(
    ("text", "masked", "without"),
    [
        ("a http://u:p@h:1/x, b@c", "a http://***@h:1/x, b@c", "a http://h:1/x, b@c"),
        ("postgresql+psycopg2://me:pw@db/x", "postgresql+psycopg2://***@db/x", None),
        ("https://tok@h http://h/a@b", "https://***@h http://h/a@b", "https://h http://h/a@b"),
        ("http://me:p'w\"d@h", "http://***@h", "http://h"),
        ("sqlite:////tmp/me@work/mlflow.db", "sqlite:////tmp/me@work/mlflow.db", None),
        ("nothing to mask: me:pw@h", "nothing to mask: me:pw@h", None),
    ],
)
def test_credentials_of_uris(text: str, masked: str, without: str | None) -> None:
    assert mask_uris(text) == masked
    assert without_credentials(text) == (without or masked.replace("***@", ""))
