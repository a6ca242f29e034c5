"""The credentials file of an adopted volume: a mistake in it is told before anything starts, and never with a value."""

from __future__ import annotations

from pathlib import Path

import pytest
from labctl import credentials_file
from labctl.errors import ConfigError

GOOD = """\
# as the compose file's .env has them
POSTGRES_USER=ada
POSTGRES_PASSWORD='se=cret'
export POSTGRES_DB="labdb"
MINIO_ROOT_USER = ada-s3
MINIO_ROOT_PASSWORD=another#one
COMPOSE_PROJECT_NAME=x
"""


def written(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "credentials"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_compose_env_file_is_read(tmp_path: Path) -> None:
    assert credentials_file.read(written(tmp_path, GOOD), "lab.yaml:7") == {
        "postgres_user": "ada",
        "postgres_password": "se=cret",
        "postgres_database": "labdb",
        "s3_user": "ada-s3",
        "s3_password": "another#one",
    }


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [
        (None, 0o600, "can't be read"),
        (GOOD, 0o644, "Others may read"),
        (GOOD.replace("MINIO_ROOT_USER", "USER"), 0o600, "lacks MINIO_ROOT_USER"),
        (GOOD.replace("'se=cret'", ""), 0o600, "lacks POSTGRES_PASSWORD"),
    ],
)
def test_a_file_that_cannot_be_used_is_a_usage_error(tmp_path: Path, text: str | None, mode: int, words: str) -> None:
    path = tmp_path / "none" if text is None else written(tmp_path, text, mode)
    with pytest.raises(ConfigError) as refused:
        credentials_file.read(path, "lab.yaml:7")
    error = refused.value
    assert words in error.what
    assert error.source == "lab.yaml:7" and error.next_step
    assert not any(secret in str(error.as_dict()) for secret in ("se=cret", "another#one"))
