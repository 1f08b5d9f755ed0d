"""fedmesh's secure sum against the peers': every requirement as a ratio with its limit.

    python -m loadtests.peers.compare PEERS.json FEDMESH.json [FEDMESH.json ...]

A fedmesh file holds one report, of one vector length and number of lanes, or a list of them.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer
from rich.console import Console
from rich.table import Table

from services.common.errors import Code, FedmeshError

SMALL: Final = 2_048
MEDIUM: Final = 100_000
LARGE: Final = 1_000_000

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Ratio:
    """One figure held against its limit.

    Attributes:
        name: what is compared.
        value: the figure; None if a report lacks what it is made of.
        relation: how it must stand to `limit`.
        limit: the bound.
        required: whether missing it fails the comparison; otherwise it is shown for information.
    """

    name: str
    value: float | None
    relation: Literal["<=", ">="]
    limit: float
    required: bool = True

    @property
    def ok(self) -> bool:
        """Whether the figure was measured and keeps its limit."""
        if self.value is None:
            return False
        return self.value <= self.limit if self.relation == "<=" else self.value >= self.limit


def compare(fedmesh_report: Report | Sequence[Report], peers_report: Report) -> tuple[list[Ratio], bool]:
    """All ratios, and whether every required one keeps its limit.

    What was not measured fails. Where several reports of fedmesh fit (two numbers of lanes, say), the worst counts.

    Raises:
        FedmeshError: INVALID_ARGUMENT if a report lacks a field or was made with another number of hospitals.
    """
    reports = [fedmesh_report] if isinstance(fedmesh_report, Mapping) else list(fedmesh_report)
    try:
        _require_same_hospitals(reports, peers_report)
        ratios = [
            *_sizes(reports),
            *_rounds(reports, peers_report.get("flower", {})),
            *_centre(reports, peers_report.get("nvflare", {})),
            _exactness(reports, peers_report),
        ]
    except KeyError as error:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"a report lacks the field {error}: measure it again") from error
    return ratios, all(ratio.ok for ratio in ratios if ratio.required)


def _require_same_hospitals(reports: Iterable[Report], peers: Report) -> None:
    for report in reports:
        if report["hospitals"] != peers["hospitals"]:
            raise FedmeshError(
                Code.INVALID_ARGUMENT,
                f"fedmesh was measured with {report['hospitals']} hospitals, the peers with {peers['hospitals']}: "
                "measure both with the same --hospitals",
            )


def _sizes(reports: Sequence[Report]) -> list[Ratio]:
    def upload(params: int, lanes: int | None = None) -> float | None:
        return _worst(report["upload_bytes_per_parameter"] for report in _fitting(reports, params, lanes))

    return [
        Ratio("upload bytes/parameter, 1M, 2 lanes", upload(LARGE, 2), "<=", 4.2),
        Ratio("upload bytes/parameter, 1M, 1 lane", upload(LARGE, 1), "<=", 8.4),
        Ratio("upload bytes/parameter, 2,048", upload(SMALL), "<=", 20.0),
    ]


def _rounds(reports: Sequence[Report], flower: Report) -> list[Ratio]:
    """Over Flower's deployment; where that was not measured, its protocol alone is what is required: it is faster."""
    ratios = []
    for params, size in ((MEDIUM, "100k"), (LARGE, "1M")):
        ours = _worst(report["round_s"]["p50"] for report in _fitting(reports, params))
        deployed, alone = _of(flower, params), _of(flower.get("protocol_alone", {}), params)
        ratios.append(Ratio(f"round p50 / Flower's, {size}", _over(ours, deployed), "<=", 1.0, deployed is not None))
        name = f"round p50 / Flower's protocol alone, {size}"
        ratios.append(Ratio(name, _over(ours, alone), "<=", 1.0, deployed is None))
    return ratios


def _over(ours: float | None, theirs: Report | None) -> float | None:
    return None if ours is None or theirs is None else ours / theirs["round_s"]["p50"]


def _centre(reports: Sequence[Report], nvflare: Report) -> list[Ratio]:
    fitting = _fitting(reports, LARGE)
    theirs = _of(nvflare, LARGE)

    def cpu(field: str) -> float | None:
        ours = _worst(report[field] for report in fitting)
        return None if not ours or theirs is None else theirs["centre_cpu_s"] / ours

    bandwidth = _worst(report["add_over_bandwidth_bound"] for report in fitting)
    return [
        # Theirs is that of deserialising and adding; ours that of four services with transport, protocol and log.
        Ratio("NVFlare's centre CPU / ours, 1M", cpu("centre_cpu_s"), ">=", 5.0),
        Ratio("NVFlare's CPU of adding / ours of adding, 1M", cpu("centre_adding_cpu_s"), ">=", 5.0, required=False),
        Ratio("addition / memory-bandwidth bound, 1M", bandwidth, "<=", 40.0),
    ]


def _exactness(reports: Sequence[Report], peers: Report) -> Ratio:
    """The share of measurements, ours and theirs, whose sum was right: without it the other figures mean nothing."""
    flower, nvflare = peers.get("flower", {}), peers.get("nvflare", {})
    theirs = [row for part in (flower, flower.get("protocol_alone", {}), nvflare) for row in _rows(part)]
    right = [bool(report["exact"]) for report in (*reports, *theirs)]
    return Ratio("sums that were right", sum(right) / len(right) if right else None, ">=", 1.0)


def _rows(figures: Report) -> list[Report]:
    return list(figures.get("params", {}).values())


def _of(figures: Report, params: int) -> Report | None:
    found: Report | None = figures.get("params", {}).get(str(params))
    return found


def _fitting(reports: Sequence[Report], params: int, lanes: int | None = None) -> list[Report]:
    return [report for report in reports if report["params"] == params and lanes in (None, report["lanes"])]


def _worst(values: Iterable[float]) -> float | None:
    return max(values, default=None)


def print_ratios(console: Console, ratios: Sequence[Ratio]) -> None:
    """A table, and as the last line all ratios."""
    table = Table("ratio", "value", "limit", "", title="fedmesh against its peers")
    for ratio in ratios:
        verdict = ("[green]kept[/green]" if ratio.ok else "[red]missed[/red]") if ratio.required else "for information"
        table.add_row(ratio.name, _shown(ratio.value), f"{ratio.relation} {ratio.limit:g}", verdict)
    console.print(table)
    line = "; ".join(f"{ratio.name}: {_shown(ratio.value)}" for ratio in ratios)
    console.print(f"ratios: {line}", highlight=False, soft_wrap=True)


def _shown(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}"


def run(
    peers: Annotated[Path, typer.Argument(help="Report of `python -m loadtests.peers`.")],
    fedmesh: Annotated[list[Path], typer.Argument(help="Reports of fedmesh's own secure sum.")],
) -> None:
    """Compare; exit code 1 if a requirement is missed."""
    reports: list[Report] = []
    for path in fedmesh:
        loaded = _load(path)
        reports.extend(loaded if isinstance(loaded, list) else [loaded])
    ratios, ok = compare(reports, _load(peers))
    print_ratios(Console(), ratios)
    if not ok:
        raise typer.Exit(1)


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"cannot read the report {path}: {error}") from error


def main() -> None:
    """Exit codes: 0 all kept, 1 one missed or an error that is explained, 2 wrong usage."""
    try:
        typer.run(run)
    except FedmeshError as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
