"""What the ops page shows, as HTML: jobs, what each round waits for, who is connected. No script, nothing foreign."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from typing import Final

from services.coordinator.domain.attempt import Phase, Reports
from services.coordinator.ports import Observation

REFRESH_S: Final = 5

STYLE: Final = """
body{font:15px/1.45 system-ui,sans-serif;margin:1.5rem auto;max-width:72rem;padding:0 1rem}
body{color:#1c2733;background:#fff}
h1{font-size:1.3rem}h2{font-size:1.05rem;margin:1.6rem 0 .4rem}p{margin:.3rem 0}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:.3rem .7rem;border-bottom:1px solid #d8dee5;vertical-align:top;overflow-wrap:anywhere}
th{background:#f2f5f8;font-weight:600}.away{color:#a3261b}.here{color:#1d6b36}.dim{color:#5b6875}
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
class Seen:
    """Everything on the page, as of one moment.

    rounds: running jobs and their present attempts; None while no attempt is open. connected: by hospital since when.
    trouble: why some of it is not known.
    """

    at: datetime
    rounds: Sequence[tuple[str, Observation | None]]
    connected: Mapping[str, datetime]
    trouble: str = ""


def render(seen: Seen) -> str:
    """The page."""
    trouble = f'<p class="away"><strong>Not all is known: {escape(seen.trouble)}</strong></p>' if seen.trouble else ""
    body = "".join(
        [
            "<h1>fedmesh coordinator</h1>",
            f'<p class="dim">As of {_when(seen.at)} UTC, by this replica; refreshed every {REFRESH_S} s.</p>',
            trouble,
            f"<h2>Running jobs ({len(seen.rounds)})</h2>",
            _jobs(seen),
            f"<h2>Hospitals ({len(seen.connected)} connected)</h2>",
            _hospitals(seen),
            '<p class="dim">Privacy budgets are not shown: the registry does not tell them to the coordinator. '
            "<code>fedmesh hospitals</code> shows them to an operator.</p>",
        ]
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="{REFRESH_S}">'
        '<meta name="viewport" content="width=device-width"><title>fedmesh coordinator</title>'
        f"<style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def _jobs(seen: Seen) -> str:
    if not seen.rounds:
        return "<p>No job runs.</p>" if not seen.trouble else "<p>Not known.</p>"
    rows = []
    for job_id, observed in seen.rounds:
        attempt = observed.attempt if observed is not None else None
        if observed is None or attempt is None:
            reason = observed.waiting if observed is not None else ""
            rows.append(_row(job_id, "", "no attempt is open", reason or "the coordinator to open one", ""))
            continue
        number = f"{attempt.round}, attempt {attempt.attempt}"
        deadline = _when(datetime.fromtimestamp(attempt.deadline_ms / 1000, UTC)) if attempt.deadline_ms else ""
        rows.append(_row(job_id, number, attempt.phase.name.lower(), waits_for(observed), deadline))
    return _table(("job", "round", "phase", "waits for", "phase ends (UTC)"), rows)


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
    return f"{', '.join(missing)} {_WORDS[attempt.phase]}"


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


def _hospitals(seen: Seen) -> str:
    expected = {
        name for _, observed in seen.rounds if observed and observed.attempt for name in observed.attempt.cohort
    }
    names = sorted(expected | set(seen.connected))
    if not names:
        return "<p>No hospital is connected.</p>" if not seen.trouble else "<p>Not known.</p>"
    declined = {name for _, observed in seen.rounds if observed is not None for name in observed.declined}
    rows = []
    for name in names:
        since = seen.connected.get(name)
        state = '<span class="here">connected</span>' if since else '<span class="away">away</span>'
        told = _when(since) if since else ""
        cells = (escape(name), state, escape(told), "declined a running job" if name in declined else "")
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return _table(("hospital", "task stream", "since (UTC)", ""), rows)


def _row(*cells: str) -> str:
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"


def _table(columns: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _when(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S}"
