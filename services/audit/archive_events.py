"""Tells the log which of its entries went into archives: what was detached stands in a table, written in the same
transaction, and becomes an entry here, once."""

import asyncio
import hashlib
import json
import re
from datetime import UTC
from typing import Final

from services.audit.domain.event import Event
from services.audit.ports import Archived, Store
from services.audit.usecases import LogUseCases
from services.common.errors import FedmeshError
from services.common.identity import Identity
from services.common.ids import new_id
from services.common.telemetry import get_logger

log = get_logger(__name__)

EVENT_TYPE: Final = "log.archived"
_INTERVAL_S: Final = 60.0


class ArchiveEvents:
    """Several replicas may run one each: an event is in the log once."""

    def __init__(self, store: Store, log_: LogUseCases, service: Identity) -> None:
        self._store = store
        self._log = log_
        self._service = service

    async def run(self) -> None:
        """Look until cancelled. A database that is away ends nothing."""
        while True:
            try:
                await self.tell()
            except FedmeshError as error:
                log.warning("archives_not_told", code=error.code.value, reason=error.message)
            await asyncio.sleep(_INTERVAL_S)

    async def tell(self) -> int:
        """Append what the log was not told yet; how many events. Raises: FedmeshError as `LogUseCases.append`."""
        untold = [part for part in await self._store.run("archived", lambda tx: tx.archived()) if not part.told]
        for part in untold:
            await self._log.append(self._service, new_id(), [archived_event(part)])
            log.info("log_archived", first=part.first, last=part.stop - 1, root=part.root.hex())
        return len(untold)


def archived_event(part: Archived) -> Event:
    """The event of one range: the same whenever it is made."""
    manifest = json.loads(part.manifest)
    body = {
        "files": manifest["files"],
        "first": part.first,
        "last": part.stop - 1,
        "manifest_sha256": hashlib.sha256(part.manifest.encode()).hexdigest(),
        "root": part.root.hex(),
    }
    at = part.recorded_at.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds")
    role = re.sub(r"[^A-Za-z0-9._-]", "_", part.detached_by)
    return Event(
        str(part.event_id),
        EVENT_TYPE,
        f"{at}000Z",
        f"postgresql/{role}",
        "log/entries",
        json.dumps(body, sort_keys=True),
    )
