"""What a long benchmark has measured, kept as it goes."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Cell = Callable[[], dict[str, Any]]


class Cells:
    """What was measured, by name, a line each; a run that was cut off goes on."""

    def __init__(self, cache: Path | None, until: float = float("inf")) -> None:
        self.cache, self.until = cache, until
        self.found: dict[str, dict[str, Any]] = {}
        if cache is not None and cache.exists() and not (text := cache.read_text("utf-8")).endswith("\n"):
            cache.write_text(text[: text.rfind("\n") + 1], "utf-8")
        self.read()

    def read(self) -> None:
        """What is in the file by now: another process may write there too."""
        if self.cache is not None and self.cache.exists():
            rows = [json.loads(line) for line in self.cache.read_text("utf-8").splitlines(True) if line.endswith("\n")]
            self.found |= {row.pop("key"): row for row in rows}

    def take(self, key: str, measure: Cell) -> dict[str, Any]:
        """The cell of this name, measured if it is not there; SystemExit where the time is up."""
        if key not in self.found:
            self.read()
        if key not in self.found:
            if time.time() >= self.until:
                raise SystemExit(f"time is up before {key}; the same command goes on here.")
            started = time.time()
            self.found[key] = json.loads(json.dumps(measure()), parse_float=lambda text: round(float(text), 6))
            if self.cache is not None:
                with self.cache.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, **self.found[key]}) + "\n")
            print(f"{time.strftime('%H:%M:%S')} {key} ({time.time() - started:.0f} s)", flush=True)
        return self.found[key]
