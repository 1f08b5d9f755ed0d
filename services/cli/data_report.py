"""What `fedmesh hospital check-data` found, as a table for people and as JSON."""

from dataclasses import dataclass
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from services.cli.small_counts import SMALL, is_small, shown, shown_part, shown_parts, shown_text
from services.hospital_node.sources.drift import verdict
from services.hospital_node.sources.facts import CohortFacts, ColumnFacts, Inspection
from services.plans.manifest import PlanManifest, plan_id

_SHOWN_TEXTS: Final = 5
_SHOWN_CHARACTERS: Final = 40


@dataclass(frozen=True)
class DataReport:
    """drift: PSI by feature or label, compared with what `against` says; empty without a reference."""

    manifest: PlanManifest
    inspection: Inspection
    drift: dict[str, float]
    against: str | None
    exact: bool

    @property
    def accepted(self) -> bool:
        return not self.inspection.problems

    def problems(self) -> list[str]:
        """Why the plan refuses the data."""
        return [shown_text(problem.message, self.exact) for problem in self.inspection.problems]

    def notes(self) -> list[str]:
        """What the plan accepts and a person should know."""
        return [shown_text(note, self.exact) for note in self.inspection.notes]

    def cohort(self) -> dict[str, str]:
        """Counts of the cohort, by what they count."""
        facts, exact = self.inspection.facts, self.exact
        if facts is None:
            return {}
        rows = shown_parts(
            {
                "excluded by the schema": facts.rows_excluded,
                "of other hospitals": facts.rows_elsewhere,
                "in the cohort": facts.rows,
            },
            exact,
        )
        return {
            "rows read": shown(facts.rows_read, exact),
            **{f"rows {name}": text for name, text in rows.items()},
            "patients": shown(facts.patients, exact),
            "patients in several files": shown(facts.repeated, exact),
            "most rows of one patient": shown(facts.most_rows, exact),
            "positive outcomes": shown_part(facts.positive, facts.rows, exact),
        }

    def splits(self) -> dict[str, dict[str, str]]:
        """rows, patients and positive outcomes of every split."""
        facts, exact = self.inspection.facts, self.exact
        if facts is None:
            return {}
        rows = shown_parts({name: side.rows for name, side in facts.splits.items()}, exact)
        patients = shown_parts({name: side.patients for name, side in facts.splits.items()}, exact)
        positive = shown_parts({name: side.positive for name, side in facts.splits.items()}, exact)
        return {
            name: {"rows": rows[name], "patients": patients[name], "positive": positive[name]} for name in facts.splits
        }

    def features(self) -> list[dict[str, Any]]:
        """One entry for each feature of the plan."""
        facts = self.inspection.facts
        return [] if facts is None else [self._feature(column, facts) for column in facts.columns]

    def document(self) -> dict[str, Any]:
        """The report as JSON values; small counts are withheld as in the table."""
        return {
            "format": "fedmesh.data-report/v1",
            "plan": self.manifest.name,
            "plan_id": plan_id(self.manifest),
            "feature_schema": self.manifest.feature_schema.name,
            "source": self.inspection.source,
            "accepted": self.accepted,
            "small_counts": "exact" if self.exact else f"withheld below {SMALL[1:]}",
            "problems": self.problems(),
            "notes": self.notes(),
            "cohort": self.cohort(),
            "splits": self.splits(),
            "features": self.features(),
            "drift": {"against": self.against, "psi": {name: round(index, 4) for name, index in self.drift.items()}},
        }

    def _feature(self, column: ColumnFacts, facts: CohortFacts) -> dict[str, Any]:
        index = self.drift.get(column.name)
        return {
            "feature": column.name,
            "column": column.column,
            "missing": shown_part(column.missing, facts.rows, self.exact),
            "missing_share": self._share(column.missing, facts.rows),
            "unusable": shown(column.unusable, self.exact),
            "out_of_range": shown(column.out_of_range, self.exact),
            "unknown": self._unknown(column.unknown),
            "psi": None if index is None else round(index, 4),
        }

    def _share(self, count: int, rows: int) -> str:
        if not self.exact and (is_small(count) or is_small(rows - count)):
            return ""
        return f"{count / rows:.1%}" if rows else ""

    def _unknown(self, texts: dict[str, int]) -> dict[str, str]:
        """Texts that the schema does not know. A text of few rows is not repeated: it may be about a person."""
        common = sorted(
            ((count, text) for text, count in texts.items() if self.exact or not is_small(count)), reverse=True
        )[:_SHOWN_TEXTS]
        named = {_shortened(text): shown(count, self.exact) for count, text in common}
        rest = len(texts) - len(common)
        if rest:
            rows = sum(texts.values()) - sum(count for count, _ in common)
            named[f"{rest} other text{'s' if rest > 1 else ''}"] = shown(rows, self.exact)
        return named


def show(console: Console, report: DataReport) -> None:
    """Print the report."""
    found = report.inspection
    console.print(f"{found.source}, for plan {report.manifest.name}", style="bold", highlight=False, soft_wrap=True)
    if found.facts is not None:
        _show_cohort(console, report)
        console.print(_features_table(report))
        if report.against is not None:
            _show_drift(console, report)
    for note in report.notes():
        console.print(f"[yellow]note:[/yellow] {escape(note)}", highlight=False, soft_wrap=True)
    for problem in report.problems():
        console.print(f"[red]refused:[/red] {escape(problem)}", highlight=False, soft_wrap=True)
    if not report.exact and found.facts is not None:
        console.print(f"Counts of 1 to {int(SMALL[1:]) - 1} are withheld (--exact shows them).", style="dim")
    if report.accepted:
        console.print("[green]OK[/green] the plan accepts this data; nothing was sent", highlight=False)
    else:
        console.print("[red]NO[/red] training would refuse this data; nothing was sent", highlight=False)


def _show_cohort(console: Console, report: DataReport) -> None:
    summary = Table(box=None, show_header=False, pad_edge=False)
    for name, count in report.cohort().items():
        if count != "0":
            summary.add_row(name, count)
    console.print(summary)
    splits = Table(box=None, pad_edge=False)
    splits.add_column("split")
    for name in ("rows", "patients", "positive"):
        splits.add_column(name, justify="right")
    for name, counts in report.splits().items():
        splits.add_row(name, *counts.values())
    console.print(splits)


def _features_table(report: DataReport) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("feature", overflow="fold")
    for name in ("missing", "share", "unusable", "moved into range"):
        table.add_column(name, justify="right")
    table.add_column("texts of no level (rows)", overflow="fold")
    table.add_column("PSI", justify="right")
    for item in report.features():
        unknown = ", ".join(f"{text} ({rows})" for text, rows in item["unknown"].items())
        psi = "" if item["psi"] is None else f"{item['psi']:.3f} {verdict(item['psi'])}"
        table.add_row(
            item["feature"],
            _zero_as_blank(item["missing"]),
            "" if item["missing"] == "0" else item["missing_share"],
            _zero_as_blank(item["unusable"]),
            _zero_as_blank(item["out_of_range"]),
            escape(unknown),
            psi,
        )
    return table


def _show_drift(console: Console, report: DataReport) -> None:
    label = report.manifest.feature_schema.label.name
    worst = sorted(report.drift.items(), key=lambda item: -item[1])
    shifted = [name for name, index in worst if verdict(index) != "same"]
    text = f"compared with {report.against}: "
    if label in report.drift:
        text += f"outcome PSI {report.drift[label]:.3f} ({verdict(report.drift[label])}); "
    text += f"{len(shifted)} of {len(worst)} distributions moved (PSI 0.1 or more)"
    console.print(text + (f": {', '.join(shifted)}" if shifted else ""), highlight=False, soft_wrap=True)


def _zero_as_blank(count: str) -> str:
    return "" if count == "0" else count


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
