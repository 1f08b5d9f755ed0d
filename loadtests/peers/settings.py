"""What is asked of a peer's benchmark, and how it tells its progress."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Report = dict[str, Any]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """One benchmark of one peer.

    Attributes:
        params: vector lengths.
        hospitals: clients, each a process where the peer has processes.
        threshold: how many of them must answer for the sum to be unmasked.
        runs: measurements of each figure, after one that warms up.
        timeout_s: when to give up.
        home: the peer's virtual environment.
        work: an empty folder for logs and state.
    """

    params: tuple[int, ...]
    hospitals: int
    threshold: int
    runs: int
    timeout_s: float
    home: Path
    work: Path
