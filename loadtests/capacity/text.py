"""The model's answer in Markdown, as docs/capacity.md has it."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from loadtests.capacity.model import NODES, STORES, Assumed, Year
from loadtests.capacity.reports import Reports
from loadtests.capacity.wire import beside
from loadtests.load.figures import CONTROL, COORDINATOR, UPLOAD_STORM

DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "capacity.md"
BEGIN: Final = "<!-- printed -->"
END: Final = "<!-- end -->"
HOSPITALS: Final = (15, 50, 150, 500, 1000)
PARAMS: Final = (10_000, 100_000, 1_000_000)
# Others that take more than this of the machine show in latencies.
BUSY: Final = 0.2


def text(reports: Reports, assumed: Assumed) -> str:
    """Tables: what was assumed and measured, and what follows. Raises: FedmeshError as `Reports.year`."""
    year = reports.year(assumed)
    rounds = ("integers", "sealed to committed", "centre", "stores", "a hospital", "a hospital sends, fetches")
    calls = ("hospitals on the task stream", "calls", "p50, p99", "processor time a call", "memory of the coordinator")
    uploads = ("integers", "one upload", "uploads", "p50, p99", "processor time an upload", "a MiB")
    growing = ("", "cores", "processes, services", "shards", "TB out of the centre", "US$ a year", "of that nodes")
    return "\n\n".join(
        (
            "### Assumed\n\n" + _table(("what", "value"), _assumed(year)),
            "### Measured: a round, by size of the model\n\n" + _table(rounds, _rounds(reports)),
            "### Measured: calls, by hospitals that wait\n\n" + _table(calls, _calls(reports)),
            "### Measured: uploads, by size of the model\n\n" + _table(uploads, _uploads(reports)),
            _missed(reports),
            "### Measured: where\n\n" + _table(("report", "when", "cores", "used by others"), _where(reports)),
            "### Taken for one round of the year\n\n" + _table(("what", "value"), _measured(year)),
            "### Machines, in the busiest hour\n\n"
            + _table(("part", "cores used", "processes of one core"), _parts(year)),
            _rows(_work(year)),
            "### Money, US$ a year\n\n" + _table(("what", "federated", "centralised"), _money(year)),
            _rows(_verdict(year)),
            "### The same, by hospitals\n\nWith as many models for each hospital.\n\n"
            + _table(("hospitals", *growing[1:]), _by_hospitals(reports, assumed)),
            "### The same, by size of the model\n\n" + _table(("parameters", *growing[1:]), _by_size(reports, assumed)),
        )
    )


def write(found: str, document: Path = DOCUMENT) -> None:
    """Put the text between the document's marks."""
    before, rest = document.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    document.write_text(f"{before}{BEGIN}\n\n{found}\n\n{END}{after}", encoding="utf-8")


def _rounds(reports: Reports) -> Iterator[tuple[str, ...]]:
    for report in reports.rounds:
        sent, fetched = beside(report)
        sent += report["upload_bytes_per_parameter"] * report["params"]
        fetched += report["download_bytes_per_parameter"] * report["params"]
        yield (
            f"{report['params']:,}",
            f"{report['round_s']['p50']:.2f} s",
            f"{report['centre_cpu_s'] * 1000:,.0f} ms",
            f"{sum(report['stores_cpu_s'].values()) * 1000:,.0f} ms",
            f"{report['hospital_cpu_s'] * 1000:,.0f} ms",
            f"{sent / 1000:,.0f} kB, {fetched / 1000:,.0f} kB",
        )


def _calls(reports: Reports) -> Iterator[tuple[str, ...]]:
    for item in _scenarios(reports, CONTROL):
        cpu_s = reports.load["costs"]["call_cpu_s"][item["name"].rsplit("-", 1)[1]]
        memory = f"{item['usage'][COORDINATOR]['mib']} MiB"
        yield f"{item['streams']:,}", f"{item['calls']:,}", _latency(item), f"{cpu_s * 1000:.1f} ms", memory


def _uploads(reports: Reports) -> Iterator[tuple[str, ...]]:
    for item in _scenarios(reports, UPLOAD_STORM):
        params = item["name"].rsplit("-", 1)[1]
        cpu_s, mib = (reports.load["costs"][name][params] for name in ("upload_cpu_s", "upload_mib"))
        kept = f"{mib:.2f} MiB", f"{item['calls']:,}", _latency(item)
        yield f"{int(params):,}", *kept, f"{cpu_s * 1000:.0f} ms", f"{cpu_s / mib * 1000:.0f} ms"


def _missed(reports: Reports) -> str:
    """What the load test said itself; on a busy machine calls wait for others."""
    missed = reports.load["missed"]
    return "Limits that the load test missed:" + (_rows(missed, "\n\n") if missed else " none.")


def _scenarios(reports: Reports, kind: str) -> list[Any]:
    return [item for item in reports.load["scenarios"] if item["name"].startswith(f"{kind}-")]


def _latency(item: Mapping[str, Any]) -> str:
    return f"{item['p50_ms']:.0f} ms, {item['p99_ms']:.0f} ms"


def _where(reports: Reports) -> Iterator[tuple[str, ...]]:
    for name, machine in reports.machine.items():
        others = machine["others_cores"]
        said = "busy" if others > BUSY else "idle"
        yield f"{name}.json", machine["at"], str(machine["cores"]), f"{others:.2f} cores, {said}"


def _by_hospitals(reports: Reports, assumed: Assumed) -> Iterator[tuple[str, ...]]:
    each = assumed.models / assumed.hospitals
    for count in HOSPITALS:
        yield _growing(f"{count:,}", reports.year(replace(assumed, hospitals=count, models=each * count)))


def _by_size(reports: Reports, assumed: Assumed) -> Iterator[tuple[str, ...]]:
    for params in PARAMS:
        yield _growing(f"{params:,}", reports.year(replace(assumed, params=params)))


def _growing(what: str, year: Year) -> tuple[str, ...]:
    money, parts = year.federated(), year.one.cpu_s
    processes = sum(year.replicas(name) for name in parts if name not in STORES)
    cores = sum(year.cores(name) for name in parts)
    nodes = f"{money[NODES]:,.0f}"
    money_all = f"{sum(money.values()):,.0f}"
    return what, f"{cores:.2f}", str(processes), str(year.shards), f"{year.centre_out_tb:,.1f}", money_all, nodes


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
        ("a GB of a database for a month, three copies", f"{a.gb_month:g} US$"),
        ("a GB of an object store for a month", f"{a.gb_month_data:g} US$"),
        ("cores kept for a hospital's node", f"{a.node_cores:g}"),
        ("training data of a hospital", f"{a.gb_hospital:g} GB, copied anew {a.refreshes:g} times a year"),
    ]


def _measured(year: Year) -> list[tuple[str, str]]:
    one = year.one
    return [
        *((f"processor time of {name}", f"{seconds:.2f} s") for name, seconds in one.cpu_s.items()),
        ("processor time of a hospital, without training", f"{one.hospital_cpu_s:.2f} s"),
        (
            "a hospital sends, fetches, without states",
            f"{one.sent / 1000:,.0f} kB, {one.fetched / 1000:,.0f} kB; the upload in it is {one.upload / 1000:,.0f} kB",
        ),
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
        f"{year.in_flight:.0f} at once in the busiest hour, whose uploads take "
        f"{year.uploads_gb * 1000:,.0f} MB of Redis.",
        f"Installations side by side (shards), at most: {year.shards}. Redis has one thread and an audit log one "
        "sequencer at a time, so what takes more of a core than may be used needs another installation.",
        f"Memory for {a.hospitals:,} task streams: {waiting_mib:,.0f} MiB over all coordinators.",
        f"Training: the core of a node has room for {year.training_room_s:.1f} s of processor time in each of its "
        "rounds in the busiest hour; beyond that a hospital needs more.",
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
    cents, each = federated / year.assumed.models * 100, federated / year.assumed.hospitals
    return [
        f"By machines and bytes alone the federation costs {_times(federated, centralised)} a central copy: "
        f"{cents:.2f} cents a model, or "
        f"{each:,.0f} US$ a hospital and year.",
        f"Without the nodes, where hospitals have cores to spare, it costs "
        f"{_times(federated - year.federated()[NODES], centralised)} a central copy.",
        f"They cost the same from {year.even_at_gb(0.0):,.0f} GB of data a hospital on, and the federation 40 % less "
        f"from {year.even_at_gb(0.4):,.0f} GB on.",
        f"With {year.assumed.gb_hospital:g} GB it is 40 % cheaper if a central copy costs at least "
        f"{year.break_even(0.4):,.0f} US$ a hospital and year besides: contracts, de-identification, reviews, what "
        "a breach may cost. Nobody measured that here.",
    ]


def _times(one: float, other: float) -> str:
    ratio = one / other
    return f"{(1 - ratio) * 100:.0f} % less than" if ratio < 1 else f"{ratio:.1f} times"


def _dollars(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _rows(lines: Iterable[str], before: str = "") -> str:
    return before + "\n".join(f"- {line}" for line in lines)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
