"""What a person sees while a stage runs: one line with loss and time left, which leaves nothing in a log."""

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Report:
    """Takes a stage's news. On a terminal: a line that vanishes at the end. Elsewhere: some twenty plain lines."""

    def __init__(self, name: str, steps: int, console: Console | None) -> None:
        self.name = name
        self.steps = steps
        self.console = console
        self.started = time.monotonic()
        self.done_before = 0
        self._bar: Progress | None = None
        self._line = 0

    def step(self, step: int, loss: float | None) -> None:
        """`step` steps are done; `loss` is the last one's, per target."""
        shown = "" if loss is None else f"loss {loss:.4f}"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, loss=shown)
        elif self.console is not None and (step % max(1, self.steps // 20) == 0 or step == self.steps):
            self.say(f"{self.name} {step}/{self.steps} {shown} {self._left(step)}".rstrip())

    def say(self, text: str) -> None:
        """One line that stays."""
        if self.console is not None:
            self.console.print(text, highlight=False, markup=False)

    def _left(self, step: int) -> str:
        done = step - self.done_before
        if done <= 0 or step >= self.steps:
            return ""
        seconds = (time.monotonic() - self.started) / done * (self.steps - step)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d} left"


@contextmanager
def reporting(name: str, steps: int, done: int, *, quiet: bool) -> Generator[Report]:
    """A report for one stage, of which `done` steps were done by an earlier run; `quiet` says nothing at all."""
    console = None if quiet else Console(file=sys.stderr)
    report = Report(name, steps, console)
    report.done_before = done
    if console is None or not console.is_terminal:
        yield report
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        bar.add_task(name, total=steps, completed=done, loss="")
        report._bar = bar  # pyright: ignore[reportPrivateUsage]
        yield report
