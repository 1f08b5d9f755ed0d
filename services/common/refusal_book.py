"""Calls that were refused for who made them, gathered into few entries until the audit log has them.

The first refusal of its kind is an entry at once; those that follow within a minute are one more entry, with their
number. However much is refused, the entries that wait are bounded, for each caller and altogether, and no refusal is
left out: what is beyond a bound is counted in one entry of its caller, and beyond that in one of everybody.
"""

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from typing import Final, NamedTuple
from uuid import uuid4

from prometheus_client import Counter

from services.common.clock import Clock
from services.common.errors import Code
from services.common.identity import Identity

REFUSALS: Final = frozenset({Code.UNAUTHENTICATED, Code.PERMISSION_DENIED})
"""Errors that speak of who calls."""

WINDOW_S: Final = 60.0
# Kinds (method and reason) of one caller within a window that are told apart; further ones are counted together.
KINDS_OF_ONE: Final = 16
KINDS: Final = 512
# Entries of one caller that wait at once, apart from the one of what is beyond.
ENTRIES_OF_ONE: Final = 64
# For so many entries that may wait, one caller beyond its bound is counted under its own name.
_PART_GATHERED: Final = 8
_OTHERS: Final = "various"
_FURTHER: Final = "further refusals, not told one by one"
_MOST_REASON: Final = 300

DROPPED = Counter(
    "fedmesh_access_refusals_dropped_total",
    "Refusals of callers that the audit log will not hold one by one, by bound",
    ["bound"],
)
for _bound in ("caller", "kinds", "queue", "audit"):
    DROPPED.labels(_bound)


@dataclass(frozen=True)
class Refusal:
    """A refused call. caller: None when the certificate does not say who it is. method: `Service/Method`."""

    caller: Identity | None
    method: str
    code: Code
    reason: str


class Kind(NamedTuple):
    """What refusals of one entry have in common. caller, subject: as in the event."""

    caller: str
    subject: str
    method: str
    code: str
    reason: str

    def beyond(self) -> "Kind":
        """Of what its caller is refused beyond its bound."""
        return self._replace(method=_OTHERS, code=_OTHERS, reason=_FURTHER)


_EVERYBODY: Final = Kind(_OTHERS, f"caller/{_OTHERS}", _OTHERS, _OTHERS, _FURTHER)


@dataclass(frozen=True)
class Entry:
    """Refusals that become one event. seq: orders the entries of one process, over its restarts.

    since, until: of the first and the last of them. growing: more may come; what is sent never grows. gathered: of what
    is beyond a bound.
    """

    seq: int
    event_id: str
    kind: Kind
    count: int
    since: datetime
    until: datetime
    growing: bool
    gathered: bool


@dataclass
class _Window:
    """ends: monotonic seconds. entry: of the refusals after the first one, once there is one."""

    ends: float
    entry: int | None = None


class Changes(NamedTuple):
    """What a disk lacks: entries as they are now, and the numbers of those that are over."""

    entries: list[Entry]
    gone: list[int]


class RefusalBook:
    """The entries that wait. most: how many, but for those of what is beyond. kept: what an earlier process left.

    now: monotonic seconds.
    """

    def __init__(
        self, clock: Clock, most: int, kept: Sequence[Entry] = (), now: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._now = now
        self._most = most
        self._entries: dict[int, Entry] = {}
        self._of: Tally[str] = Tally()
        self._gathered: dict[Kind, int] = {}
        self._windows: dict[Kind, _Window] = {}
        self._kinds_of: Tally[str] = Tally()
        self._changed: set[int] = set()
        self._gone: set[int] = set()
        self.version = 0
        """Grows with every change."""
        for entry in sorted(kept, key=lambda entry: entry.seq):
            self._keep(entry)
            if entry.growing and entry.gathered:
                self._gathered[entry.kind] = entry.seq
            elif entry.growing:
                self._finish(entry.seq)
        self._next = max(self._entries, default=0) + 1

    def __len__(self) -> int:
        return len(self._entries)

    def note(self, refusal: Refusal) -> None:
        """Count a refusal. Costs little, and never fails."""
        self.end_windows()
        kind = self._kind(refusal)
        window = self._windows.get(kind)
        if window is not None:
            window.entry = self._count(window.entry, kind)
        elif len(self._windows) >= KINDS:
            self._gather(_EVERYBODY, "kinds")
        else:
            self._windows[kind] = _Window(self._now() + WINDOW_S)
            self._kinds_of[kind.caller] += 1
            first = self._count(None, kind)
            if first is not None:
                self._finish(first)

    def end_windows(self, *, all_of_them: bool = False) -> None:
        """Finish the entries of windows that are over."""
        while self._windows:
            # All are of one length: the one that was opened first ends first.
            kind, window = next(iter(self._windows.items()))
            if window.ends > self._now() and not all_of_them:
                return
            del self._windows[kind]
            _less(self._kinds_of, kind.caller)
            if window.entry is not None:
                self._finish(window.entry)

    def next_end(self) -> float | None:
        """When the next window ends, in monotonic seconds."""
        return next((window.ends for window in self._windows.values()), None)

    def release(self) -> bool:
        """Finish the entries of what is beyond the bounds. Whether there were any."""
        released, self._gathered = self._gathered, {}
        for seq in released.values():
            self._finish(seq)
        return bool(released)

    def finished(self, most: int, *, unwritten: bool) -> list[Entry]:
        """The oldest entries that may be sent. unwritten: also those that the disk does not have as they are."""
        ready = (
            entry
            for entry in self._entries.values()
            if not entry.growing and (unwritten or entry.seq not in self._changed)
        )
        return list(islice(ready, most))

    def forget(self, entries: Iterable[Entry]) -> None:
        """Leave out entries that the log has."""
        for entry in entries:
            del self._entries[entry.seq]
            _less(self._of, entry.kind.caller)
            self._changed.discard(entry.seq)
            self._gone.add(entry.seq)
            self.version += 1

    def changes(self) -> Changes:
        """What changed since the last call; from now on it counts as written."""
        taken = Changes([self._entries[seq] for seq in sorted(self._changed)], sorted(self._gone))
        self._changed, self._gone = set(), set()
        return taken

    def give_back(self, changes: Changes) -> None:
        """These were not written."""
        self._changed.update(entry.seq for entry in changes.entries if entry.seq in self._entries)
        self._gone.update(changes.gone)

    def _kind(self, refusal: Refusal) -> Kind:
        who = refusal.caller
        caller, subject = ("unknown", "caller/unknown") if who is None else (str(who), f"{who.kind.value}/{who.name}")
        kind = Kind(caller, subject, refusal.method, refusal.code.value, refusal.reason[:_MOST_REASON])
        if kind in self._windows or self._kinds_of[caller] < KINDS_OF_ONE:
            return kind
        return kind._replace(method=_OTHERS, reason=_OTHERS)

    def _count(self, seq: int | None, kind: Kind) -> int | None:
        """Count one more of a kind, in the entry that it has, or in a new one. None: in one of what is beyond."""
        if seq is not None:
            self._grow(seq)
            return seq
        if self._of[kind.caller] >= ENTRIES_OF_ONE:
            self._gather(kind.beyond(), "caller")
            return None
        if len(self._entries) - len(self._gathered) >= self._most:
            self._gather(kind.beyond(), "queue")
            return None
        return self._begin(kind, gathered=False)

    def _gather(self, kind: Kind, bound: str) -> None:
        DROPPED.labels(bound).inc()
        if kind not in self._gathered and len(self._gathered) >= self._most // _PART_GATHERED:
            kind = _EVERYBODY
        if kind in self._gathered:
            self._grow(self._gathered[kind])
        else:
            self._gathered[kind] = self._begin(kind, gathered=True)

    def _begin(self, kind: Kind, *, gathered: bool) -> int:
        at = self._clock.now()
        entry = Entry(self._next, str(uuid4()), kind, 1, at, at, growing=True, gathered=gathered)
        self._next += 1
        self._keep(entry)
        self._touch(entry.seq)
        return entry.seq

    def _keep(self, entry: Entry) -> None:
        self._entries[entry.seq] = entry
        self._of[entry.kind.caller] += 1

    def _grow(self, seq: int) -> None:
        entry = self._entries[seq]
        self._entries[seq] = replace(entry, count=entry.count + 1, until=self._clock.now())
        self._touch(seq)

    def _finish(self, seq: int) -> None:
        self._entries[seq] = replace(self._entries[seq], growing=False)
        self._touch(seq)

    def _touch(self, seq: int) -> None:
        self._changed.add(seq)
        self.version += 1


def _less(tally: Tally[str], key: str) -> None:
    tally[key] -= 1
    if not tally[key]:
        del tally[key]
