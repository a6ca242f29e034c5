"""Whether this machine's clock agrees with the cloud's: leases, credentials and their ends are reckoned by it."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from labctl.errors import ConfigError

if TYPE_CHECKING:
    from labctl.cloud.session import Cloud

#: Worth a word in `doctor`. Certificates and Keystone forgive about as much.
NOTICEABLE = timedelta(seconds=60)
#: No lab is brought up beyond this: the drain before a lease's end has 15 minutes, S3 refuses requests beyond them.
TOLERATED = timedelta(minutes=5)


def skew_text(skew: timedelta) -> str:
    """How far off the clock is, in words."""
    seconds = abs(skew.total_seconds())
    off = f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
    return f"this machine's clock is {off} {'ahead' if skew > timedelta(0) else 'behind'}"


def refuse_if_wrong(cloud: Cloud) -> None:
    """Raises ConfigError where the clock is so far off that leases and credentials would end at another time."""
    if abs(cloud.clock_skew) > TOLERATED:
        raise ConfigError(
            f"{skew_text(cloud.clock_skew)} of the cloud's",
            expected=f"at most {TOLERATED.seconds // 60} minutes between them: leases and credentials end by it",
            found=f"{cloud.clock_skew.total_seconds():+.0f} s when the cloud issued the token",
            source=f"this machine and {cloud.auth_url}",
            next_step="timedatectl set-ntp true, then run the same command again",
        )
