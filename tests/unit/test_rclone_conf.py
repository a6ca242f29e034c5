"""What of a user's rclone.conf would be lost, and whose secret would be taken."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "roles" / "rclone" / "module_utils"))

from rclone_conf import BadConfig, refuse_unreadable, secret_of, section, shown, with_section

WANTED = {"type": "swift", "application_credential_id": "new", "application_credential_secret": "s2"}
TEXT = "[chi_tacc]\ntype = swift\napplication_credential_id = new\napplication_credential_secret = s2\n"
OTHERS = "# mine\n[laptop]\ntype=local\n\n[x y]\n; note\nkey = a=b\n"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", TEXT),
        (TEXT, TEXT),
        (OTHERS, OTHERS + "\n" + TEXT),
        (OTHERS.rstrip("\n"), OTHERS + "\n" + TEXT),
        ("[chi_tacc]\ntype = swift\napplication_credential_id = old\n\n" + OTHERS, TEXT + "\n" + OTHERS),
        (
            OTHERS + "\n[chi_tacc]\nuser = u\n\n[last]\ntype = local\n",
            OTHERS + "\n" + TEXT + "\n[last]\ntype = local\n",
        ),
        # The same options in another order or style are left as their owner wrote them.
        ("[chi_tacc]\napplication_credential_secret=s2\ntype=swift\napplication_credential_id=new\n", None),
    ],
)
def test_only_the_remotes_own_lines_change(before: str, after: str | None) -> None:
    assert with_section(before, "chi_tacc", WANTED) == (before if after is None else after)
    assert section(with_section(before, "chi_tacc", WANTED), "chi_tacc") == WANTED


@pytest.mark.parametrize(("identity", "secret"), [("new", "s2"), ("other", "s3"), ("absent", ""), ("empty", "")])
def test_a_secret_is_only_taken_from_its_own_credential(identity: str, secret: str) -> None:
    text = TEXT + "[b]\napplication_credential_id = other\napplication_credential_secret = s3\n"
    text += "[c]\napplication_credential_id = empty\napplication_credential_secret =\n"
    assert secret_of(text, "application_credential_id", identity, "application_credential_secret") == secret


def test_an_encrypted_configuration_is_not_taken_for_an_empty_one() -> None:
    with pytest.raises(BadConfig, match="encrypted"):
        refuse_unreadable("# Encrypted rclone configuration File\n\nRCLONE_ENCRYPT_V0:\nAAAA\n")


@pytest.mark.parametrize(
    "option", ["application_credential_secret", "secret_access_key", "key", "pass", "not_known_yet"]
)
def test_a_diff_hides_the_secret_of_any_kind_of_remote(option: str) -> None:
    assert shown({"type": "x", option: "canary"}) == f"type = x\n{option} = (hidden)\n"
