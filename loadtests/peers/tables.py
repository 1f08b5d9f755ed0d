"""The peers' figures as tables."""

from rich.console import Console
from rich.table import Table

from loadtests.peers.settings import Report


def print_report(console: Console, results: Report) -> None:
    """One table a peer."""
    if flower := results.get("flower"):
        table = Table(
            "parameters", "in", "p50 s", "p99 s", "rounds", "bytes/parameter up", "sum", title=_title("Flower", flower)
        )
        for mode, figures in (("deployment", flower), ("protocol alone", flower["protocol_alone"])):
            for size, row in figures["params"].items():
                took = row["round_s"]
                times = (f"{took['p50']:.2f}", f"{took['p99']:.2f}", str(took["runs"]))
                table.add_row(
                    f"{int(size):,}", mode, *times, f"{row['upload_bytes_per_parameter']:.2f}", _sum(row["exact"])
                )
        console.print(table)
        if flower["failure"]:
            console.print(f"the deployment failed: {flower['failure']}", highlight=False, markup=False)
    if nvflare := results.get("nvflare"):
        table = Table(
            "parameters", "centre's CPU s", "runs", "bytes/parameter up", "sum", title=_title("NVFlare", nvflare)
        )
        for size, row in nvflare["params"].items():
            up = f"{row['upload_bytes_per_parameter']:.2f}"
            table.add_row(f"{int(size):,}", f"{row['centre_cpu_s']:.2f}", str(row["runs"]), up, _sum(row["exact"]))
        console.print(table)


def _title(name: str, figures: Report) -> str:
    return f"{name} {figures['version']}"


def _sum(right: bool) -> str:
    return "right" if right else "WRONG"
