"""What the ops page shows, as HTML: jobs, what each round waits for, who is connected, what is left. No script."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from typing import Final

from services.coordinator.domain.attempt import Phase, Reports
from services.coordinator.ports import Observation

REFRESH_S: Final = 5
_MOST_NAMES: Final = 12

# On a narrow screen a row becomes a block of lines, each with its column's name before it.
STYLE: Final = """
:root{color-scheme:light dark;--text:#1c2733;--page:#fff;--line:#d8dee5;--head:#f2f5f8}
:root{--bad:#a3261b;--good:#1d6b36;--dim:#5b6875}
@media(prefers-color-scheme:dark){
:root{--text:#dde4ec;--page:#12181f;--line:#33404d;--head:#1d2731;--bad:#ff8a7a;--good:#6fd08c;--dim:#98a6b5}}
body{font:15px/1.45 system-ui,sans-serif;margin:1.5rem auto;max-width:72rem;padding:0 1rem}
body{color:var(--text);background:var(--page)}
h1{font-size:1.3rem}h2{font-size:1.05rem;margin:1.6rem 0 .4rem}p{margin:.3rem 0}
div{overflow-x:auto}table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:.3rem .7rem;border-bottom:1px solid var(--line);vertical-align:top;white-space:nowrap}
th{background:var(--head);font-weight:600}code{font-size:13px}
.text{display:inline-block;min-width:14rem;white-space:normal}
meter{width:5rem;margin-right:.4rem;vertical-align:middle}
.bad{color:var(--bad)}.good{color:var(--good)}.dim{color:var(--dim)}
@media(max-width:46rem){thead{display:none}table,tbody,tr,td{display:block}
tr{border-bottom:1px solid var(--line);padding:.4rem 0}
td{border:0;padding:.1rem 0;white-space:normal}td:empty{display:none}
td::before{content:attr(data-of);color:var(--dim);display:inline-block;width:9.5rem;vertical-align:top}
.text{max-width:calc(100% - 9.7rem);min-width:0}code{word-break:break-all}}
"""

_WORDS: Final = {
    Phase.TRAINING: "to have trained",
    Phase.SHARE: "to send shares",
    Phase.UPLOAD: "to upload",
    Phase.CONFIRM: "to sign the list of survivors",
    Phase.UNMASK: "to reveal shares",
    Phase.AGREE: "to decrypt the sum and say what they saw",
    Phase.FINALIZE: "to store the next state",
    Phase.ATTEST: "to check the next state",
}


@dataclass(frozen=True)
class Budgets:
    """Epsilon that hospitals have left, as far as reported, and the most that they may have."""

    left: Mapping[str, float]
    limit: float


@dataclass(frozen=True)
class Seen:
    """Everything on the page, as of one moment; None is what could not be read, and `trouble` says why.

    rounds: running jobs and their present attempts; None while no attempt is open. connected: by hospital since when.
    """

    at: datetime
    rounds: Sequence[tuple[str, Observation | None]] | None
    connected: Mapping[str, datetime] | None
    budgets: Budgets | None
    trouble: Sequence[str] = ()


def render(seen: Seen) -> str:
    """The page."""
    rounds = "not known" if seen.rounds is None else str(len(seen.rounds))
    names = _names(seen)
    connected = "not known" if seen.connected is None else f"{len(seen.connected)} of {len(names)}"
    body = "".join(
        [
            "<h1>fedmesh coordinator</h1>",
            f'<p class="dim">As of {_when(seen.at)} UTC; refreshed every {REFRESH_S} s. It only shows.</p>',
            *(f'<p class="bad"><strong>Not all is known: {escape(reason)}</strong></p>' for reason in seen.trouble),
            f"<h2>Jobs running: {rounds}</h2>",
            _jobs(seen),
            f"<h2>Hospitals connected: {connected}</h2>",
            _hospitals(seen, names),
            '<p class="dim">Epsilon left: of 365 days, by what hospitals reported to the registry; their own ledgers '
            "decide.</p>",
        ]
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="{REFRESH_S}">'
        '<meta name="viewport" content="width=device-width"><title>fedmesh coordinator</title>'
        f"<style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def _jobs(seen: Seen) -> str:
    if not seen.rounds:
        return "<p>No job runs.</p>" if seen.rounds is not None else ""
    rows: list[Sequence[str]] = []
    for job_id, observed in seen.rounds:
        attempt = observed.attempt if observed is not None else None
        job = f"<code>{escape(job_id)}</code>"
        if observed is None or attempt is None:
            reason = observed.waiting if observed is not None else ""
            rows.append((job, "", "none", _text(reason or "the coordinator to open an attempt"), ""))
            continue
        number, phase = f"{attempt.round}, attempt {attempt.attempt}", attempt.phase.name.lower()
        rows.append((job, number, phase, _text(waits_for(observed)), _deadline(attempt.deadline_ms, seen.at)))
    return _table(("job", "round", "phase", "waits for", "phase ends (UTC)"), rows)


def _deadline(deadline_ms: int, now: datetime) -> str:
    if not deadline_ms:
        return ""
    at = datetime.fromtimestamp(deadline_ms / 1000, UTC)
    left = round((at - now).total_seconds())
    return f"in {left} s, at {at:%H:%M:%S}" if left > 0 else f'<span class="bad">ended at {at:%H:%M:%S}</span>'


def waits_for(observed: Observation) -> str:
    """What a round waits for, in words."""
    attempt = observed.attempt
    if attempt is None or attempt.phase not in _WORDS:
        reason = "" if attempt is None else attempt.reason
        return observed.waiting or reason or "the coordinator's next step"
    if attempt.phase is Phase.FINALIZE:
        missing = [] if observed.reports.states else [attempt.finalizer]
    else:
        done = _done(attempt.phase, observed.reports)
        asked = attempt.cohort if attempt.phase is Phase.TRAINING else _asked(observed)
        missing = [name for name in asked if name not in done and name not in observed.declined]
    if not missing:
        return "the coordinator's next step"
    more = f" and {len(missing) - _MOST_NAMES} more" if len(missing) > _MOST_NAMES else ""
    return f"{', '.join(missing[:_MOST_NAMES])}{more} {_WORDS[attempt.phase]}"


def _asked(observed: Observation) -> Sequence[str]:
    attempt = observed.attempt
    assert attempt is not None, "asked of an open attempt only"
    if attempt.phase is Phase.SHARE:
        return attempt.group
    if attempt.phase is Phase.UPLOAD:
        return attempt.sharers
    return attempt.survivor_ids


def _done(phase: Phase, reports: Reports) -> frozenset[str]:
    done = {
        Phase.TRAINING: reports.ready,
        Phase.SHARE: reports.shares,
        Phase.UPLOAD: reports.uploads,
        Phase.CONFIRM: reports.confirmations,
        Phase.UNMASK: reports.reveals,
        Phase.AGREE: reports.digests,
        Phase.ATTEST: reports.verdicts,
    }
    return frozenset(done[phase])


def _open(seen: Seen) -> list[Observation]:
    return [observed for _, observed in seen.rounds or () if observed is not None]


def _expected(seen: Seen) -> set[str]:
    """Hospitals that a running job counts on."""
    return {name for observed in _open(seen) if observed.attempt for name in observed.attempt.cohort}


def _names(seen: Seen) -> list[str]:
    known = seen.budgets.left if seen.budgets is not None else {}
    return sorted(_expected(seen) | set(seen.connected or ()) | set(known))


def _hospitals(seen: Seen, names: Sequence[str]) -> str:
    expected = _expected(seen)
    declined = {name: decline.reason for observed in _open(seen) for name, decline in observed.declined.items()}
    if not names:
        return "<p>No hospital is known.</p>" if not seen.trouble else ""
    rows = []
    for name in names:
        note = _text(f"declined: {declined[name]}", bad=True) if name in declined else ""
        stream, since = _stream(name, seen.connected, name in expected)
        rows.append((escape(name), stream, since, _left(name, seen.budgets), note))
    return _table(("hospital", "task stream", "since (UTC)", "epsilon left", ""), rows)


def _stream(name: str, connected: Mapping[str, datetime] | None, expected: bool) -> tuple[str, str]:
    if connected is None:
        return "?", ""
    if name in connected:
        return '<span class="good">connected</span>', _when(connected[name])
    # Who is away matters when a round counts on it.
    return ('<span class="bad">away, a running job expects it</span>' if expected else "away"), ""


def _left(name: str, budgets: Budgets | None) -> str:
    if budgets is None or name not in budgets.left:
        return "?"
    left, limit = budgets.left[name], budgets.limit
    words = f"{left:g} of {limit:g}"
    # As the meter, which turns yellow below a fifth.
    words = f'<span class="bad">{words}</span>' if left < limit / 5 else words
    return f'<meter min="0" max="{limit:g}" low="{limit / 5:g}" value="{left:g}"></meter> {words}'


def _text(words: str, *, bad: bool = False) -> str:
    """Words that may take several lines."""
    return f'<span class="text{" bad" if bad else ""}">{escape(words)}</span>' if words else ""


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """rows: HTML of their cells."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{_cells(columns, row)}</tr>" for row in rows)
    return f"<div><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _cells(columns: Sequence[str], row: Sequence[str]) -> str:
    named = zip(columns, row, strict=True)
    return "".join(f'<td data-of="{escape(column)}">{cell}</td>' for column, cell in named)


def _when(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S}"
