"""What `fedmesh doctor` finds: a level, what was looked at, what was seen, and what to do about it."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from rich.console import Console
from rich.markup import escape

from services.cli.tables import make_table


class Level(StrEnum):
    """WARN: works, but somebody should look; FAIL: does not work, or will be refused."""

    OK = "OK"
    WARN = "WARN"
    FAIL = "FAIL"


_COLOURS = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "red"}


@dataclass(frozen=True)
class Finding:
    """part: the process or store that was looked at. todo: what to do; empty when all is well."""

    level: Level
    part: str
    check: str
    seen: str
    todo: str = ""


def as_json(findings: Iterable[Finding]) -> dict[str, Any]:
    """The findings, and how many there are of each level."""
    listed = list(findings)
    counts = {level.value: sum(item.level is level for item in listed) for level in Level}
    return {"findings": [asdict(item) for item in listed], "counts": counts}


def print_findings(console: Console, findings: Iterable[Finding]) -> None:
    """A table, in the order of the checks, and one line that sums it up."""
    listed = list(findings)
    table = make_table("", "part", "check", "what was seen, and what to do")
    for item in listed:
        told = escape(item.seen) + (f"\n[bold]-> {escape(item.todo)}[/bold]" if item.todo else "")
        table.add_row(
            f"[{_COLOURS[item.level]}]{item.level.value}[/{_COLOURS[item.level]}]", escape(item.part), item.check, told
        )
    console.print(table)
    counts = as_json(listed)["counts"]
    console.print(f"{counts['OK']} in order, {counts['WARN']} to look at, {counts['FAIL']} failed", highlight=False)
