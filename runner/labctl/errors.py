"""Every way a labctl command ends other than well.

An error says what went wrong, what was expected, what was found, where the value came from and which
command to run next. Its class decides the exit code; `cli` prints it and nothing else does.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class LabctlError(Exception):
    """Base of everything labctl raises on purpose.

    `what` is one sentence. `expected`, `found` and `source` (a flag, an environment variable or
    `lab.yaml:LINE`) are facts; `next_step` is a command or an action. `detail` is text of somebody else
    (a cloud's own words, the failing task's output), shown once and whole.
    """

    what: str
    expected: str = ""
    found: str = ""
    source: str = ""
    next_step: str = ""
    detail: str = field(default="", repr=False)

    exit_code = 1

    def __str__(self) -> str:
        return self.what

    def as_dict(self) -> dict[str, str | int]:
        """The error for `--json`: the texts that are set, and the exit code."""
        texts = {name: getattr(self, name) for name in ("what", "expected", "found", "source", "next_step", "detail")}
        return {"exit_code": self.exit_code, **{name: text for name, text in texts.items() if text}}


class ConfigError(LabctlError):
    """A mistake in the command line, the environment or lab.yaml."""

    exit_code = 2


class CloudRefused(LabctlError):
    """The cloud said no, or what it holds isn't what is needed: authentication, quota, lease, a state."""

    exit_code = 3


class HostUnreachable(LabctlError):
    """The server exists and can't be logged into."""

    exit_code = 4


class ConvergeFailed(LabctlError):
    """A task failed on the host, or the host isn't in the state it should be in."""

    exit_code = 5


class SafetyStop(LabctlError):
    """Data might be at risk. Nothing was written."""

    exit_code = 6
