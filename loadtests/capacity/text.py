"""The model's answer in Markdown, as docs/capacity.md has it."""

from collections.abc import Iterable

from loadtests.capacity.model import STORES, Year


def text(year: Year) -> str:
    """Tables: what was assumed and measured, and what follows."""
    return "\n\n".join(
        (
            "### Assumed\n\n" + _table(("what", "value"), _assumed(year)),
            "### Measured, for one round\n\n" + _table(("what", "value"), _measured(year)),
            "### Machines, in the busiest hour\n\n"
            + _table(("part", "cores used", "processes of one core"), _parts(year)),
            _rows(_work(year)),
            "### Money, US$ a year\n\n" + _table(("what", "federated", "centralised"), _money(year)),
            _rows(_verdict(year)),
        )
    )


def _assumed(year: Year) -> list[tuple[str, str]]:
    a = year.assumed
    return [
        ("hospitals", f"{a.hospitals:,}"),
        ("models a year", f"{a.models:,.0f}"),
        ("a model", f"{a.rounds} rounds of {year.one.cohort} hospitals, {a.params:,} parameters"),
        ("busiest hour over the mean", f"{a.peak:g}"),
        ("part of a core that may be used", f"{a.filled:g}"),
        ("epsilon of a private model, of a population in a year", f"{a.epsilon:g}, {a.budget:g}"),
        ("a core for an hour", f"{a.core_hour:g} US$"),
        ("a GB that leaves a cloud or a hospital", f"{a.gb_out:g} US$"),
        ("a GB stored for a month", f"{a.gb_month:g} US$"),
        ("cores kept for a hospital's node", f"{a.node_cores:g}"),
        ("training data of a hospital", f"{a.gb_hospital:g} GB, copied anew {a.refreshes:g} times a year"),
    ]


def _measured(year: Year) -> list[tuple[str, str]]:
    one = year.one
    return [
        *((f"processor time of {name}", f"{seconds:.2f} s") for name, seconds in one.cpu_s.items()),
        ("processor time of a hospital, without training", f"{one.hospital_cpu_s:.2f} s"),
        ("a hospital sends, fetches", f"{one.upload / 1000:,.0f} kB, {one.download / 1000:,.0f} kB"),
        ("sealed to committed", f"{one.seconds:.2f} s"),
        (
            "a hospital that only waits",
            f"{year.waiting.cores * 1000:.3f} thousandths of a core, {year.waiting.mib * 1024:.0f} KiB of memory",
        ),
    ]


def _parts(year: Year) -> list[tuple[str, str, str]]:
    return [
        (name, f"{year.cores(name):.2f}", "" if name in STORES else str(year.replicas(name))) for name in year.one.cpu_s
    ]


def _work(year: Year) -> list[str]:
    a = year.assumed
    waiting_mib = year.waiting.mib * a.hospitals
    return [
        f"Rounds: {year.per_second:.2f} a second on average, {year.turns:,.0f} a day for a hospital; "
        f"{year.in_flight:.0f} at once in the busiest hour, whose uploads take {year.uploads_gb:.2f} GB of Redis.",
        f"Installations side by side (shards), at most: {year.shards}. Redis has one thread and an audit log one "
        "sequencer at a time, so what takes more of a core than may be used needs another installation.",
        f"Memory for {a.hospitals:,} task streams: {waiting_mib:,.0f} MiB over all coordinators.",
        f"Bytes a year: {year.hospital_out_tb:,.1f} TB out of hospitals, {year.centre_out_tb:,.1f} TB out of the "
        f"centre, {year.kept_tb:,.1f} TB of versions kept at its end.",
        f"Privacy: budgets last for {year.private_models:,.0f} private models a year, whatever the machines. "
        f"{a.models:,.0f} models are models without the guarantee, or take {a.models / year.private_models:,.0f} times "
        "the budget.",
    ]


def _money(year: Year) -> list[tuple[str, str, str]]:
    federated, centralised = year.federated(), year.centralised()
    names = list(dict.fromkeys((*federated, *centralised)))
    rows = [(name, _dollars(federated.get(name)), _dollars(centralised.get(name))) for name in names]
    return [*rows, ("**together**", _dollars(sum(federated.values())), _dollars(sum(centralised.values())))]


def _verdict(year: Year) -> list[str]:
    federated, centralised = sum(year.federated().values()), sum(year.centralised().values())
    ratio = federated / centralised
    said = f"{(1 - ratio) * 100:.0f} % less than" if ratio < 1 else f"{ratio:.1f} times"
    cents, each = federated / year.assumed.models * 100, federated / year.assumed.hospitals
    return [
        f"By machines and bytes alone the federation costs {said} a central copy: {cents:.2f} cents a model, or "
        f"{each:,.0f} US$ a hospital and year.",
        f"They cost the same from {year.even_at_gb(0.0):,.0f} GB of data a hospital on, and the federation 40 % less "
        f"from {year.even_at_gb(0.4):,.0f} GB on.",
        f"With {year.assumed.gb_hospital:g} GB it is 40 % cheaper if a central copy costs at least "
        f"{year.break_even(0.4):,.0f} US$ a hospital and year besides: contracts, de-identification, reviews, what "
        "a breach may cost. Nobody measured that here.",
    ]


def _dollars(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _rows(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
