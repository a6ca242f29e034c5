"""How the program ends other than well: what, expected, found, next step, and the kind that decides the exit code."""

from __future__ import annotations

#: Exit codes of labctl: usage, the cloud refused, the host isn't as it should be, data might be at risk.
EXIT_CODES = {"usage": 2, "refused": 3, "failed": 5, "safety_stop": 6}


class Failure(Exception):
    """Says what went wrong. `kind` is a key of EXIT_CODES; with `safety_stop` nothing of the lab's was changed."""

    def __init__(
        self, msg: str, *, kind: str = "failed", expected: str = "", found: str = "", next_step: str = ""
    ) -> None:
        super().__init__(msg)
        self.kind, self.msg = kind, msg
        self.expected, self.found, self.next_step = expected, found, next_step

    def as_dict(self) -> dict[str, str]:
        """The texts that are set, and the kind."""
        texts = {"msg": self.msg, "expected": self.expected, "found": self.found, "next_step": self.next_step}
        return {"kind": self.kind, **{name: text for name, text in texts.items() if text}}
