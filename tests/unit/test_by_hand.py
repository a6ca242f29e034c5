"""The file with a credential that a person made: the right one is taken, a wrong one is named without its secret."""

from __future__ import annotations

from pathlib import Path

import pytest
from labctl import by_hand
from labctl.errors import ConfigError


def private(folder: Path, text: str, name: str = "file.sh") -> Path:
    path = folder / name
    path.write_text(text)
    path.chmod(0o600)
    return path


@pytest.mark.parametrize(
    ("name", "text", "dialect"),
    [
        ("a.sh", "export OS_APPLICATION_CREDENTIAL_ID=i\nexport OS_APPLICATION_CREDENTIAL_SECRET=s\n", "swift"),
        ("b.sh", "export EC2_ACCESS_KEY=i\nexport EC2_SECRET_KEY='s'\n", "s3"),
        ("c.env", "AWS_ACCESS_KEY_ID=i\nAWS_SECRET_ACCESS_KEY=s\n", "s3"),
        (
            "d.yaml",
            "clouds: {openstack: {auth: {application_credential_id: i, application_credential_secret: s}}}\n",
            "swift",
        ),
    ],
)
def test_what_horizon_hands_out_is_understood(tmp_path: Path, name: str, text: str, dialect: str) -> None:
    found = by_hand.read(private(tmp_path, text, name), "lab.yaml:5")
    assert (found.id, found.secret, found.dialect) == ("i", "s", dialect)


@pytest.mark.parametrize("name", ["x.sh", "x.yaml"])
def test_a_password_is_never_taken_for_the_server(tmp_path: Path, name: str) -> None:
    text = {
        "x.sh": "export OS_USERNAME=ada\nexport OS_PASSWORD=pw-77\n",
        "x.yaml": "clouds: {openstack: {auth: {username: ada, password: pw-77}}}",
    }[name]
    with pytest.raises(ConfigError) as caught:
        by_hand.read(private(tmp_path, text, name), "lab.yaml:5")
    assert "password" in caught.value.found
    assert caught.value.source == "lab.yaml:5"
    assert "pw-77" not in str(caught.value.as_dict())


@pytest.mark.parametrize("text", ["", "{", "clouds: 3", "clouds: {a: {}, b: {}}"])
def test_a_clouds_yaml_with_nothing_of_use_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="holds no credential"):
        by_hand.read(private(tmp_path, text, "e.yaml"), "lab.yaml:5")
