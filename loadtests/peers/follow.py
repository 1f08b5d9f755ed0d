"""Reading what a peer's process appends to its file of JSON lines."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from loadtests.peers.children import Children
from services.common.errors import Code, FedmeshError

_LOOK_S: Final = 0.2


def follow(records: Path, children: Children, silence_s: float) -> Iterator[dict[str, Any]]:
    """Every record as it comes, until the one that says `finished`.

    Raises:
        FedmeshError: DEADLINE_EXCEEDED when no record comes for `silence_s` seconds; or as `Children.check`.
    """
    read, heard = 0, time.monotonic()
    while True:
        text = records.read_text() if records.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()
        for line in lines[read:]:
            record: dict[str, Any] = json.loads(line)
            if "finished" in record:
                return
            yield record
        if len(lines) > read:
            read, heard = len(lines), time.monotonic()
        if time.monotonic() - heard > silence_s:
            raise FedmeshError(
                Code.DEADLINE_EXCEEDED,
                f"no figure for {silence_s:.0f} s: is the machine busy with something else? logs: {records.parent}",
            )
        children.check()
        time.sleep(_LOOK_S)
