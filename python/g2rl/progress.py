"""What a terminal shows: text and times in few words, and how far a training is."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Self

from rich import box, get_console
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn
from rich.table import Column, Table


def printable(text: str, limit: int) -> str:
    """`text` on one line, without control characters; past `limit` characters its middle is left out."""
    line = "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text.strip())
    half = (limit - 3) // 2
    return line if len(line) <= limit else f"{line[:half]} … {line[len(line) - half :]}"  # the end has the answer


def duration(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def rich_table(title: str | None, header: Iterable[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table for the terminal, whose first column names the rows."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for k, name in enumerate(header):
        table.add_column(name, justify="left" if k == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


class Display:
    """Lines of text, and on a terminal a bar below them while its ``with`` block lasts.

    Args:
        columns: of the bar.
        console: where to show it; None is the process's own.
    """

    def __init__(self, *columns: ProgressColumn, console: Console | None = None) -> None:
        self._console = console or get_console()
        on_terminal = self._console.is_terminal and not self._console.is_dumb_terminal
        self._bar = Progress(*columns, console=self._console) if on_terminal else None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def message(self, text: str) -> None:
        """Show a line above the bar, or as a line of its own; `text` is taken literally."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class TrainingProgress(Display):
    """A bar with the main numbers on a terminal; elsewhere one plain line a step.

    Args:
        total_steps: the last step's number.
        start_step: steps done before, in a resumed run.
        console: where to show it; None is the process's own, which `RunLog` prints to as well.
    """

    SHOWN = (
        ("train/accuracy", "acc {:.3f}"),
        ("train/reward", "reward {:+.3f}"),
        ("train/entropy", "entropy {:.2f}"),
        ("time/tokens_per_second", "{:.0f} tok/s"),
    )

    def __init__(self, total_steps: int, start_step: int = 0, console: Console | None = None) -> None:
        super().__init__(
            SpinnerColumn(),
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[numbers]}", table_column=Column()),  # may wrap; the others stay whole
            console=console,
        )
        self._total = total_steps
        self._recent: deque[float] = deque(maxlen=20)
        if self._bar:
            self._task = self._bar.add_task("", total=total_steps, completed=start_step, left="", numbers="")

    def step(self, step: int, metrics: Mapping[str, float], seconds: float) -> None:
        """Show that `step` is done.

        Args:
            step: its number, from 1.
            metrics: the step's numbers, as given to `RunLog.metrics`; missing ones are left out.
            seconds: wall time of the step; the time left is the mean of the last 20 for every step to come.
        """
        self._recent.append(seconds)
        left = f"{duration((self._total - step) * sum(self._recent) / len(self._recent))} left"
        parts = [form.format(metrics[key]) for key, form in self.SHOWN if key in metrics]
        parts += [f"held-out {key[5:]} {metrics[key]:.3f}" for key in metrics if key.startswith("eval/pass@")]
        if "eval/reward" in metrics:
            parts.append(f"held-out reward {metrics['eval/reward']:+.3f}")
        numbers = "  ".join(parts)
        if self._bar:
            self._bar.update(self._task, completed=step, left=left, numbers=numbers)
        else:
            self.message(f"step {step}/{self._total}  {left}  {numbers}")
