"""The summary that a person sees when the demonstration is over."""

import math
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.table import Table

from services.cli.stack import DEMO_DIR
from services.demo.datasets import DemoData
from services.demo.promotion import Checked
from services.demo.report import Results
from services.secure_sum.cohort import colluders

# Header of the column, name of the figure, decimals.
_COLUMNS: Final = (
    ("AUROC", "auroc", 4),
    ("AUPRC", "auprc", 4),
    ("Brier", "brier", 4),
    ("recall@10%", "recall_at_10pct", 3),
)
# Where accuracy says anything; one column less, so that the table fits 80 columns.
_WITH_ACCURACY: Final = (*_COLUMNS[:3], ("accuracy", "accuracy_client_mean", 4), ("pooled", "accuracy_pooled", 4))

_CHECKED: Final[tuple[tuple[str, JustifyMethod], ...]] = (
    *(("check", "left"), ("value", "right"), ("limit", "left"), ("result", "left"), ("signed by", "left")),
)


def print_summary(console: Console, results: Results, folder: Path, data: DemoData) -> None:
    """Figures, what they are of, the privacy that was spent, durations, and where to look next."""
    console.print()
    console.print(_figures(results))
    if len(results.runs) > 1:
        console.print(_repetition(results, data))
    console.print(
        f"[dim]Data: {data.description}. The test comparison is made by this harness from the local files; it never "
        "went through the services and lies outside the privacy guarantee.[/dim]"
    )
    if results.last.personal_models is not None:
        console.print(
            f"Personal models: {results.last.personal_models} of {results.last.hospitals} hospitals have one that is "
            f"better on their own validation records{_of_last(results)}; any other uses the shared one. None left its "
            "hospital."
        )
    _print_privacy(console, results)
    _print_promotion(console, results)
    _print_run(console, results)
    console.print(f"\nLook next (the data stays in {folder} until the next demo):")
    program = _program()
    there = "" if folder == DEMO_DIR else f" --dir {shlex.quote(str(folder))}"
    for command, what in (
        (f"models{there}", "the model versions"),
        *((f"{lineage}{there}", said) for lineage, said in _lineage(results)),
        (f"rounds{there}", "every committed round"),
        (f"audit status{there}", "how far hospitals have witnessed the log"),
        (f"audit export --out LOG{there}", "the audit log as files"),
        ("audit verify LOG", "check them offline"),
        (f"privacy ledger{there}", "what each hospital spent on its patients"),
    ):
        console.print(f"  [bold]{program} {command}[/bold]  {what}", highlight=False, soft_wrap=True)


def _program() -> str:
    """How a person starts the command from here: an environment's programs are not on everybody's PATH."""
    program = Path(sys.prefix) / "bin" / "fedmesh"
    return str(program.relative_to(Path.cwd())) if program.is_relative_to(Path.cwd()) else "fedmesh"


def _figures(results: Results) -> Table:
    test, alone = results.test, results.local_only
    table = Table(title=f"Common test set: {test['n_encounters']:,} encounters of {test['n_patients']:,} patients")
    table.add_column("model")
    judged = "accuracy_pooled" in test
    columns = _WITH_ACCURACY if judged else _COLUMNS
    if judged:
        table.caption = (
            "accuracy: at a probability of 0.5, mean of the hospitals, each on its own rows; pooled: all rows"
        )
    for header, _name, _decimals in columns:
        table.add_column(header, justify="right")

    def add(label: str, figures: Mapping[str, float]) -> None:
        cells = [f"{figures[name]:.{places}f}" if name in figures else "" for _header, name, places in columns]
        table.add_row(label, *cells)

    add(f"federated, {results.last.hospitals} hospitals", test)
    if results.test_sd is not None:
        add(f"  standard deviation, {len(results.runs)} runs", results.test_sd)
    personal = "accuracy_client_mean_personalised"
    if personal in test:
        add("each with its own version", {"accuracy_client_mean": test[personal]})
        if results.test_sd is not None:
            add(f"  standard deviation, {len(results.runs)} runs", {"accuracy_client_mean": results.test_sd[personal]})
    for label, kind in (("each hospital alone, mean", "mean"), ("each alone, weighted by rows", "weighted")):
        figures = {name: alone[f"{name}_{kind}"] for name in ("auroc", "auprc")}
        if kind == "mean" and "accuracy_client_mean" in alone:
            figures["accuracy_client_mean"] = alone["accuracy_client_mean"]
        add(label, figures)
    return table


def _repetition(results: Results, data: DemoData) -> str:
    """What the deviation is of, so that nobody takes it for more."""
    runs = len(results.runs)
    noise = "" if results.last.privacy is None else "the noise, drawn afresh"
    differs = " and ".join(part for part in (noise, data.seeded) if part) or (
        "nothing by intention, for there is no noise"
    )
    same = "cohort, partition and initial values" if data.seeded else "cohort, partition, split and initial values"
    return (
        f"Means over {runs} runs, each on a stack of its own with fresh ledgers: [bold]one release, imagined {runs} "
        f"times[/bold]. What differs between the runs: {differs}; {same} are the same."
    )


def _of_last(results: Results) -> str:
    return " in the last run" if len(results.runs) > 1 else ""


def _print_privacy(console: Console, results: Results) -> None:
    facts = results.last.privacy
    if facts is None:
        console.print("Privacy: [yellow]none[/yellow]. This version is marked and can never be promoted.")
        return
    console.print(
        f"Privacy of each patient: {facts.guarantee}, against the centre and {facts.guarantee.colluders} colluding "
        f"hospitals; {facts.attempts} charged attempts have spent {facts.spent}{_of_last(results)}."
    )
    least, most = facts.guarantee.colluders, colluders(results.last.hospitals)
    if least < most:
        console.print(
            f"The hospitals of this demonstration agreed to f = {least} (privacy.least_colluders); by default they "
            f"demand {most}, and refuse such a plan.",
            highlight=False,
        )


def _print_promotion(console: Console, results: Results) -> None:
    """What was checked of the last version, value against limit, and who promoted it."""
    done = results.last.promotion
    if done is None:
        return
    table = Table(title=f"Before promotion of version {done.version}{_of_last(results)}")
    for header, justify in _CHECKED:
        table.add_column(header, justify=justify)
    for item in done.checks:
        limit = "" if item.limit is None else f"{'least' if item.at_least else 'most'} {item.limit:.4g}"
        by = f"{item.signed_by} hospitals" if item.signed_by else "registry"
        passed = "[green]passed[/green]" if item.passed else "[red]blocks[/red]"
        table.add_row(item.check, _value(item), limit, passed, by)
    console.print(table)
    if not done.promoted:
        reasons = "; ".join(f"{item.check}: {item.reason}" for item in done.checks if not item.passed)
        console.print(f"[yellow]Not promoted.[/yellow] {escape(reasons)}", highlight=False)
        return
    pulled = f"{done.pulled_by} pulled it and verified" if done.pulled_by else "No hospital could pull it yet"
    console.print(
        f"Promoted to production: proposed by {done.proposed_by}, approved by {done.approved_by}. {pulled}: "
        f"{escape(done.pulled)}.",
        highlight=False,
    )


def _value(item: Checked) -> str:
    if item.value is None:
        return ""
    # What was spent is never understated.
    value = math.ceil(item.value * 1e4) / 1e4 if item.check == "privacy" else item.value
    return f"{value:.4g}"


def _lineage(results: Results) -> list[tuple[str, str]]:
    done = results.last.promotion
    if done is None:
        return []
    version = f"{results.last.job_id[:8]}/{done.version}"
    return [(f"models lineage {version}", "what it came from and what was checked")]


def _print_run(console: Console, results: Results) -> None:
    report, numbers = results.last, results.as_dict()
    if len(results.runs) > 1:
        console.print(f"{len(results.runs)} runs took {results.wall_s:.0f} s. The last one:")
    console.print(
        f"Ran {report.rounds} rounds in {report.wall_s:.0f} s ({report.startup_s:.0f} s start-up) with "
        f"{report.processes} processes, {numbers['peak_memory_mb'] / 1024:.1f} GiB at the peak; sealed to committed "
        f"{numbers['round_overhead_s']['p50']:.2f} s (p50), {numbers['round_overhead_s']['p99']:.2f} s (p99); "
        f"{report.audit_entries} audit entries."
    )
