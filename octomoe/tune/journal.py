"""What an interrupted search has measured, so that it can go on."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)


class Journal:
    """Measurements of one search in a file, a line of JSON each; without a file, nothing is kept.

    What was measured under another `about` counts for nothing here: another layer, device, version.
    Lines that were cut short by the end of a process are ignored.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        self._path, self._about = path, dict(about)
        self._found: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            text = path.read_text(encoding="utf-8", errors="replace")
            for line in text.splitlines():
                self._read(line)
            if text and not text.endswith("\n"):
                with path.open("a", encoding="utf-8") as file:
                    file.write("\n")

    def find(self, what: Mapping[str, Any]) -> dict[str, Any] | None:
        """The outcome of what was measured, None if it was not."""
        return self._found.get(self._identity(what))

    def add(self, what: Mapping[str, Any], outcome: dict[str, Any]) -> None:
        """Keep an outcome; it is on the disk when this returns."""
        self._found[self._identity(what)] = outcome
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**self._about, **what, "outcome": outcome}) + "\n")

    def remove(self) -> None:
        """Forget everything: the search is over."""
        self._found.clear()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _identity(self, what: Mapping[str, Any]) -> str:
        return json.dumps({**self._about, **what}, sort_keys=True)

    def _read(self, line: str) -> None:
        try:
            parts = json.loads(line)
            outcome = parts.pop("outcome")
            is_known = "us" in outcome or "error" in outcome
        except (ValueError, KeyError, AttributeError, TypeError):
            _log.warning("%s: ignored what is no measurement: %.60s", self._path, line)
            return
        if is_known:
            self._found[json.dumps(parts, sort_keys=True)] = outcome
