"""What the processes of a stack have used."""

from typing import Final

import psutil

from services.embedded.stack import Stack

WORKERS: Final = "aggregator's workers"


def families(stack: Stack) -> dict[str, list[psutil.Process]]:
    """The running parts' processes with all their descendants."""
    roots = {part.name: psutil.Process(part.pid) for part in stack.status() if part.pid is not None}
    return {name: [root, *root.children(recursive=True)] for name, root in roots.items()}


def cpu_seconds(stack: Stack) -> dict[str, float]:
    """CPU seconds so far of every part, children that ended included; and of the aggregator's children alone."""
    used = {}
    for name, family in families(stack).items():
        root, *rest = (process.cpu_times() for process in family)
        children = sum(t.user + t.system + t.children_user + t.children_system for t in rest)
        children += root.children_user + root.children_system
        used[name] = root.user + root.system + children
        if name == "aggregator":
            used[WORKERS] = children
    return used


def store_cpu_seconds(stack: Stack, service: str) -> float:
    """CPU seconds so far of one service and of PostgreSQL with the backends that it has now."""
    parts = {part.name: psutil.Process(part.pid) for part in stack.status() if part.pid is not None}
    server = parts["PostgreSQL"]
    return float(sum(sum(one.cpu_times()[:2]) for one in (parts[service], server, *server.children())))
