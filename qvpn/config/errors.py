"""What is wrong with a file that an operator wrote: one sentence with file, table and key."""

from __future__ import annotations

from pathlib import Path


class ConfigError(Exception):
    """``FILE: [table] key: what is wrong``, always one line, never with a secret in it."""

    def __init__(self, problem: str, *, file: Path | str | None = None, table: str = "", key: str = "") -> None:
        self.problem = " ".join(problem.split())
        self.file = file
        self.table = table
        self.key = key
        super().__init__(self._text())

    def _text(self) -> str:
        place = " ".join(part for part in (self.table, self.key) if part)
        start = "" if self.file is None else f"{self.file}: "
        return f"{start}{place}: {self.problem}" if place else f"{start}{self.problem}"

    def within(self, file: Path | str) -> ConfigError:
        """The same error with the file named."""
        return ConfigError(self.problem, file=file, table=self.table, key=self.key)


class IdentityError(ConfigError):
    """A key file that cannot be used: missing, readable by others, damaged, of the wrong kind."""
