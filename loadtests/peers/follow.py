"""Reading what a peer's process appends to its file of JSON lines."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from loadtests.peers.children import Children

_LOOK_S: Final = 0.2


def follow(records: Path, children: Children) -> Iterator[dict[str, Any]]:
    """Every record as it comes, until the one that says `finished`.

    Raises:
        FedmeshError: as `Children.check`.
    """
    read = 0
    while True:
        text = records.read_text() if records.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()
        for line in lines[read:]:
            record: dict[str, Any] = json.loads(line)
            if "finished" in record:
                return
            yield record
        read = len(lines)
        children.check()
        time.sleep(_LOOK_S)
