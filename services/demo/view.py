"""The live view of a run: a screen that redraws on a terminal, one line an event elsewhere."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from services.demo.progress import Progress
from services.privacy.noise import Guarantee

_PHASES = ("training", "share", "upload", "confirm", "unmask", "agree", "committed")
_LAST_ROUNDS = 8


class View:
    """Shows a Progress. spent_after: what a number of charged attempts has spent; None without privacy."""

    def __init__(self, console: Console, title: str, spent_after: Callable[[int], Guarantee] | None) -> None:
        self._console = console
        self._title = title
        self._spent_after = spent_after
        self._started = time.monotonic()
        self._live = Live(console=console, refresh_per_second=4, transient=False) if console.is_terminal else None
        self._printed_rounds = 0
        self._printed_connected = 0
        self._printed_note = ""
        self._printed_unmeasured = False

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, progress: Progress) -> None:
        """Draw the present state."""
        if self._live is not None:
            self._live.update(self._screen(progress))
        else:
            self._lines(progress)

    def _lines(self, progress: Progress) -> None:
        if len(progress.connected) != self._printed_connected:
            self._printed_connected = len(progress.connected)
            self._say(f"{self._printed_connected} of {len(progress.hospitals)} hospitals connected")
        for done in progress.rounds[self._printed_rounds :]:
            if done.burnt:
                self._say(f"round {done.version}/{progress.total_rounds} burnt: {done.burnt_reason}")
                continue
            facts = [f"{name} {value}" for name, value in self._measured(progress, done.version) if value]
            facts += [self._spent(progress, done.version)]
            self._say(
                f"round {done.version}/{progress.total_rounds} committed: {len(done.contributions)} hospitals, "
                f"{len(done.contributions) * done.upload_bytes / 1024:,.0f} KiB encrypted {' '.join(facts)}".rstrip()
            )
        self._printed_rounds = len(progress.rounds)
        if progress.unmeasured and not self._printed_unmeasured:
            self._printed_unmeasured = True
            self._say(f"loss and AUROC: {progress.unmeasured}")
        if progress.note and progress.note != self._printed_note:
            self._say(progress.note)
        self._printed_note = progress.note

    def _say(self, text: str) -> None:
        # A line of a log stays a line, however wide.
        line = f"[{time.monotonic() - self._started:6.1f} s] {text}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    @staticmethod
    def _measured(progress: Progress, version: int) -> list[tuple[str, str]]:
        metrics = progress.metrics.get(version, {})
        return [
            ("loss", f"{metrics['loss']:.4f}" if "loss" in metrics else ""),
            ("AUROC", f"{metrics['auroc']:.4f}" if "auroc" in metrics else ""),
        ]

    def _spent(self, progress: Progress, version: int) -> str:
        """What the rounds up to a version have spent; empty without privacy."""
        if self._spent_after is None:
            return ""
        attempts = sum(done.attempt.attempt for done in progress.rounds if done.version <= version)
        return f"spent {self._spent_after(attempts)}"

    def _screen(self, progress: Progress) -> Panel:
        committed = len(progress.rounds)
        header = Table.grid(padding=(0, 2))
        header.add_row(
            Text(f"round {min(committed + 1, progress.total_rounds)} of {progress.total_rounds}"),
            self._phases(progress),
        )
        header.add_row(
            ProgressBar(total=max(1, progress.total_rounds), completed=committed, width=24),
            Text(
                f"{progress.uploaded_bytes / 1024:,.0f} KiB encrypted, {time.monotonic() - self._started:.0f} s",
                style="dim",
            ),
        )
        parts: list[RenderableType] = [header, self._hospitals(progress), self._rounds(progress)]
        if self._spent_after is not None:
            parts.append(Text(f"privacy of each patient: {self._spent(progress, progress.total_rounds)}"))
        if progress.unmeasured:
            parts.append(Text(f"loss and AUROC: {progress.unmeasured}", style="dim"))
        if progress.note:
            parts.append(Text(progress.note, style="yellow"))
        return Panel(Group(*parts), title=self._title, border_style="blue")

    @staticmethod
    def _phases(progress: Progress) -> Text:
        text = Text()
        for phase in _PHASES:
            text.append(phase, style="bold reverse green" if phase == progress.phase else "dim")
            text.append(" > " if phase != _PHASES[-1] else "", style="dim")
        return text

    @staticmethod
    def _hospitals(progress: Progress) -> Text:
        text = Text("hospitals  ")
        for hospital in progress.hospitals:
            if hospital in progress.declined:
                style = "red"
            elif hospital not in progress.connected:
                style = "dim"
            elif progress.finished.get(hospital) == progress.phase:
                style = "bold green"
            else:
                style = "yellow"
            text.append(f"{hospital.rsplit('-', 1)[-1]} ", style=style)
        text.append("  (grey: away, yellow: working, green: done with this phase, red: declined)", style="dim")
        return text

    def _rounds(self, progress: Progress) -> Table:
        table = Table(box=None, pad_edge=False)
        names = ["round", "hospitals", "sealed to committed", "loss", "AUROC"]
        for name in names:
            table.add_column(name, justify="right", style="cyan" if name == "round" else "")
        for done in progress.rounds[-_LAST_ROUNDS:]:
            if done.burnt:
                table.add_row(str(done.version), "burnt", *["-"] * (len(names) - 2), style="red")
                continue
            seconds = (done.committed_at.ToDatetime() - done.sealed_at.ToDatetime()).total_seconds()
            facts = [value or "-" for _name, value in self._measured(progress, done.version)]
            table.add_row(str(done.version), str(len(done.contributions)), f"{seconds:.2f} s", *facts)
        return table
