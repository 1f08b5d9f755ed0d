"""The reports that the model starts from, in `measured`: of rounds by size of the model, of a load test, and on what
machine each was made.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loadtests.capacity.model import Assumed, Waiting, Year, round_at
from loadtests.capacity.wire import beside
from services.common.errors import Code, FedmeshError

MEASURED: Final = Path(__file__).parent / "measured"
LOAD: Final = "load"
MACHINE: Final = "machine"


@dataclass(frozen=True)
class Reports:
    """rounds: of `fedmesh bench secure-sum`, by size of the model. load: of `make loadtest`. machine: by report."""

    rounds: Sequence[Mapping[str, Any]]
    load: Mapping[str, Any]
    machine: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "Reports":
        """Raises: FedmeshError(INVALID_ARGUMENT) for a folder without such reports."""
        try:
            rounds = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("rounds-*.json")]
            load, machine = (json.loads((folder / f"{name}.json").read_text()) for name in (LOAD, MACHINE))
            found = cls(sorted(rounds, key=lambda report: int(report["params"])), load, machine)
            found.year(Assumed())
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FedmeshError(Code.INVALID_ARGUMENT, f"not the reports that are needed: {error!r}") from error
        return found

    def year(self, assumed: Assumed) -> Year:
        """The model over them. Raises: FedmeshError(INVALID_ARGUMENT) as `round_at`."""
        costs = self.load["costs"]
        waiting = Waiting(costs["stream_cores"], costs["stream_mib"])
        return Year(assumed, round_at(self.rounds, assumed.params, beside), waiting)
