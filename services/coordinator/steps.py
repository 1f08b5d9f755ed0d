"""What each decision of the state machine does outside: one function for each.

Whatever a step does outside is idempotent and happens before the step is stored, so that a replica that takes over
repeats it harmlessly.
"""

import asyncio
from typing import Final

from services.common.errors import Code, FedmeshError
from services.common.telemetry import attempt_span, get_logger
from services.coordinator import details, ending
from services.coordinator.beginning import all_counted, open_attempt, rebuild, sum_expires_at
from services.coordinator.domain import machine
from services.coordinator.domain.attempt import Attempt, Contribution, Counted
from services.coordinator.ending import abort, burn, give_up
from services.coordinator.outward import Job
from services.coordinator.tasks import Papers
from services.coordinator.tenure import Case
from services.coordinator.wire import attempt_ref
from services.secure_sum.opening import mask_keys, open_masks, survivors_statement
from services.secure_sum.statements import Advert, Signed, adverts_digest, parse

log = get_logger(__name__)

_LOST_SUM: Final = frozenset({Code.NOT_FOUND, Code.WRONG_STATE})


async def act(decision: machine.Decision, case: Case, job: Job) -> float:
    """Do what was decided; seconds to wait before the next look, 0 for none.

    Raises: OutdatedError; FedmeshError, after which the step is tried again.
    """
    with attempt_span(f"coordinator.{type(decision).__name__.lower()}", *case.attempt.id):
        match decision:
            case machine.Reopen():
                return await _reopen(case, job)
            case machine.EndJob(reason, cause):
                await case.tenure.record(case.attempt)
                await ending.fail_job(case.tenure, job, reason, cause)
            case machine.Abort(reason, fatal):
                if not await abort(case, reason, fatal=fatal):
                    await _rebuild(case, job)
            case machine.Burn(reason):
                await burn(case, reason)
            case machine.Commit():
                await ending.commit(case, decision)
            case _:
                await _go_on(decision, case, job)
    return 0


async def _go_on(decision: machine.Decision, case: Case, job: Job) -> None:
    tenure, now, ends = case.tenure, case.tenure.now_ms(), case.phase_ends_ms()
    match decision:
        case machine.Seal(group):
            await _seal(case, group)
        case machine.FixSharers(sharers):
            await tenure.move(case.seen, case.attempt.shared(sharers, now))
        case machine.OpenSum():
            await _open_sum(case, job)
        case machine.CloseSum() if case.attempt.bound:
            await _close_returned(case)
        case machine.CloseSum():
            await _close_sum(case, job)
        case machine.StoreSurvivors(confirming):
            await _store_survivors(case, job, confirming)
        case machine.OpenMasks(revealing):
            await _open_masks(case, job, revealing)
        case machine.Finalize(agreement, finalizer):
            await tenure.move(case.seen, ending.note_agreement(case, agreement).finalizing(finalizer, now, ends))
        case machine.Attest(agreement, sha256, metrics_json):
            noted = ending.note_agreement(case, agreement)
            await tenure.move(case.seen, noted.attested_by(sha256, metrics_json, now, ends))


async def _reopen(case: Case, job: Job) -> float:
    tenure, attempt = case.tenure, case.attempt
    await tenure.record(attempt)
    after = f"{attempt.round}/{attempt.attempt}"
    return await open_attempt(tenure, job, case.seen, case.manifest, after=after, before=attempt)


async def _rebuild(case: Case, job: Job) -> None:
    """The registry holds survivors that are not known here: what is known here is behind."""
    stored = await case.tenure.parts.registry.survivors(job.job_id)
    if stored is not None:
        await rebuild(case.tenure, job, case.seen, case.manifest, stored)


async def _given_up(case: Case, job: Job, error: FedmeshError) -> None:
    if not await give_up(case, error):
        await _rebuild(case, job)


async def _seal(case: Case, group: tuple[str, ...]) -> None:
    tenure = case.tenure
    adverts = await tenure.shelf.new_adverts(case.attempt, group)
    ages = {item.hospital_id: parse(Advert, item.statement).age for item in adverts}
    sealed = case.attempt.sealed(ages, adverts_digest(adverts), tenure.now_ms(), case.phase_ends_ms())
    await tenure.move(case.seen, sealed, Papers(adverts=adverts))
    tenure.record_aside(sealed)


async def _upload_papers(case: Case) -> Papers:
    shelf, attempt = case.tenure.shelf, case.attempt
    shares = await shelf.shares_by_recipient(attempt)
    return Papers(adverts=await shelf.adverts(attempt), shares=shares)


async def _open_sum(case: Case, job: Job) -> None:
    tenure, attempt = case.tenure, case.attempt
    roster = await tenure.parts.rosters.get(attempt.roster_sha256)
    expires_at = sum_expires_at(attempt, case.rules, tenure.now_ms())
    tenure.record_aside(attempt)
    try:
        upload_bytes, papers = await asyncio.gather(
            tenure.parts.aggregator.open(attempt, case.manifest, roster, expires_at), _upload_papers(case)
        )
    except FedmeshError as error:
        await _given_up(case, job, error)
        return
    await tenure.move(case.seen, attempt.uploading(upload_bytes, tenure.now_ms(), case.phase_ends_ms()), papers)


async def _close_sum(case: Case, job: Job) -> None:
    tenure, attempt = case.tenure, case.attempt
    roster = await tenure.parts.rosters.get(attempt.roster_sha256)
    try:
        counted = await tenure.parts.aggregator.close(attempt.id, attempt.needed)
        survived, uploads = await _survivors(case, counted)
        adverts = await tenure.shelf.adverts(attempt)
        ref = attempt_ref(attempt.id)
        statement = survivors_statement(roster, attempt.epoch, ref, adverts, attempt.sharers, uploads)
    except FedmeshError as error:
        tenure.strike_aside(attempt.id, error, "shares")
        await _given_up(case, job, error)
        return
    listed = attempt.listed(survived, statement.decode("ascii"), tenure.now_ms(), case.phase_ends_ms())
    await tenure.move(case.seen, listed)
    # While the hospitals sign.
    tenure.aside(_pack_details(case, listed))


async def _survivors(case: Case, counted: tuple[Counted, ...]) -> tuple[tuple[Contribution, ...], dict[str, Signed]]:
    """Who was counted under the very statement that it sent here. Fetched after the sum was closed.

    Another one over the same ciphertext will not do: with other hashes of its segments it would have every hospital
    that checks the sum blame the aggregator.
    """
    sent = await case.tenure.shelf.uploads_sent(case.attempt)
    told = [item for item in counted if item.hospital_id in sent]
    alike = [item for item in told if sent[item.hospital_id].sha256 == item.upload_sha256]
    if len(alike) < len(told):
        unlike = sorted({item.hospital_id for item in told} - {item.hospital_id for item in alike})
        log.warning("upload_statements_differ", hospitals=unlike, **case.facts)
    survived = tuple(Contribution(item.hospital_id, item.sha256) for item in alike)
    return survived, {item.hospital_id: sent[item.hospital_id] for item in survived}


async def _pack_details(case: Case, listed: Attempt) -> bytes:
    shelf = case.tenure.shelf
    adverts, shares, uploads = (
        await shelf.adverts(listed),
        await shelf.shares(listed),
        await shelf.uploads(listed),
    )
    packed = await asyncio.to_thread(details.pack, listed, adverts, shares, uploads)
    if not packed:
        log.warning("details_too_large", **case.facts)
    case.tenure.details = (listed.id, packed)
    return packed


async def _store_survivors(case: Case, job: Job, confirming: tuple[str, ...]) -> None:
    tenure, attempt = case.tenure, case.attempt
    registry = tenure.parts.registry
    confirmations = await tenure.shelf.confirmations(attempt, confirming)
    held = tenure.details
    packed = held[1] if held is not None and held[0] == attempt.id else await _pack_details(case, attempt)
    try:
        await registry.store_survivors(attempt, confirmations, packed)
    except FedmeshError as error:
        if error.retryable:
            raise
        stored = await registry.survivors(attempt.job_id)
        if stored is None or stored.statement != attempt.survivors.encode():
            await _given_up(case, job, error)
            return
        confirmations = dict(stored.confirmations)
    confirmed = attempt.confirmed(tuple(sorted(confirmations)), tenure.now_ms(), case.phase_ends_ms())
    await tenure.move(case.seen, confirmed, Papers(confirmations=confirmations))
    tenure.details = None
    tenure.record_aside(confirmed)


async def _close_returned(case: Case) -> None:
    """The survivors have sent their uploads again: all of them must be there, as they were listed."""
    tenure, attempt = case.tenure, case.attempt
    try:
        counted = await tenure.parts.aggregator.close(attempt.id, len(attempt.contributions))
    except FedmeshError as error:
        if error.retryable:
            raise
        await burn(case, error.message[: machine.REASON_LENGTH])
        return
    if not all_counted(attempt, counted):
        await burn(case, "the survivors did not send the uploads that they had signed for")
        return
    confirmations = await tenure.shelf.confirmations(attempt, attempt.confirming)
    confirmed = attempt.confirmed(attempt.confirming, tenure.now_ms(), case.phase_ends_ms())
    await tenure.move(case.seen, confirmed, Papers(confirmations=confirmations))


async def _open_masks(case: Case, job: Job, revealing: tuple[str, ...]) -> None:
    tenure, attempt = case.tenure, case.attempt
    shelf = tenure.shelf
    roster = await tenure.parts.rosters.get(attempt.roster_sha256)
    reveals = await shelf.reveals(attempt, revealing)
    adverts, uploads = await shelf.adverts(attempt), await shelf.uploads(attempt)
    try:
        opening = await asyncio.to_thread(open_masks, roster, attempt.survivors.encode(), adverts, reveals)
    except FedmeshError as error:
        # More reveals may help; at the deadline the version is burnt.
        log.warning("masks_not_opened", reveals=len(reveals), reason=error.message, **case.facts)
        tenure.strike_aside(attempt.id, error, "opening")
        await tenure.move(case.seen, attempt.stuck(len(revealing), error.message))
        return
    keys = mask_keys(adverts, roster, attempt.sharers)
    try:
        sum_sha256 = await tenure.parts.aggregator.compute(attempt, keys, opening)
    except FedmeshError as error:
        if error.retryable:
            raise
        await _sum_lost(case, job, error)
        return
    await _ask_for_digests(case, revealing, sum_sha256, Papers(uploads=uploads, opening=opening))


async def _ask_for_digests(case: Case, revealing: tuple[str, ...], sum_sha256: str, papers: Papers) -> None:
    tenure, attempt = case.tenure, case.attempt
    finalizer = machine.first_finalizer(attempt, case.around, case.rules)
    summed = attempt.summed(revealing, sum_sha256, finalizer, tenure.now_ms(), case.phase_ends_ms())
    await tenure.move(case.seen, summed, papers)
    tenure.record_aside(summed)


async def _sum_lost(case: Case, job: Job, error: FedmeshError) -> None:
    """The aggregator has not got the uploads any more: ask the survivors for the same bytes again."""
    stored = await case.tenure.parts.registry.survivors(job.job_id)
    if error.code not in _LOST_SUM or case.attempt.returned >= machine.MAX_RETURNS or stored is None:
        await burn(case, error.message[: machine.REASON_LENGTH])
        return
    log.warning("sum_lost", reason=error.message, **case.facts)
    await rebuild(case.tenure, job, case.seen, case.manifest, stored, returned=case.attempt.returned)
