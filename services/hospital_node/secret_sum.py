"""The hospital's part in masked sums: the protocol's steps, each durable before anything of it is sent."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import IO

import numpy as np

from services.common.errors import Code, FedmeshError
from services.hospital_node.domain.ports import Int64Vector
from services.hospital_node.domain.sums import MaskedUpload, SumCheck, SumTerms
from services.hospital_node.domain.tasks import AttemptId, Task
from services.hospital_node.store.attempts import AttemptStore
from services.secure_sum import encoding, masks, opening, public, secret
from services.secure_sum.encryption import Encryptor, PublicEncryptor
from services.secure_sum.member import Member, MemberState
from services.secure_sum.roster import MemberKeys
from services.secure_sum.statements import Advert, Signed, Survivors, Upload, parse
from services.secure_sum.wire import Layout

_MOST_REMEMBERED = 8


class MaskedSums:
    """See `domain.ports.SecureSum` for the contract, `secure_sum.parameters` for the arithmetic."""

    def __init__(self, keys: MemberKeys, store: AttemptStore) -> None:
        self._keys = keys
        self._store = store
        # The newest states, as they are on the disk: parsing one takes longer than a step.
        self._states: dict[AttemptId, MemberState] = {}
        self._pending: dict[AttemptId, MemberState] = {}

    def advert(self, terms: SumTerms) -> Signed | None:
        state = self._state(terms.attempt)
        if state is None:
            return None
        if (state.roster, state.epoch, state.cohort) != (terms.roster.sha256, terms.keys.epoch, terms.cohort):
            raise FedmeshError(
                Code.EQUIVOCATION, "this attempt was begun with another roster, epoch or cohort: it stays with these"
            )
        if state.upload is None and not self._store.has_unmasked(terms.attempt):
            return None
        return state.advert

    def begin(self, terms: SumTerms, values: Int64Vector, age: int) -> Signed:
        before = self._state(terms.attempt)
        if before is not None and before.upload is not None:
            raise FedmeshError(Code.WRONG_STATE, "this attempt has its upload: it cannot begin again")
        if before is not None and parse(Advert, before.advert.statement).age != age:
            raise FedmeshError(Code.WRONG_STATE, "this attempt was begun with a contribution of another age")
        layout = terms.layout
        try:
            encoding.require_encodable(values, layout.params, layout.lanes)
        except FedmeshError as error:
            raise FedmeshError(Code.PLAN_INVALID, error.message) from error
        if values.size != layout.vector_length:
            raise FedmeshError(Code.PLAN_INVALID, f"expected {layout.vector_length} values, got {values.size}")
        zeros = _encryptor(terms).zeros(layout)
        sha256 = self._store.save_unmasked(terms.attempt, _prepared(layout, zeros, values))
        # One advert an attempt, even when its ciphertext was lost before anybody had it.
        state = before or self._member(terms).begin(terms.attempt.ref, terms.keys.epoch, terms.cohort, age)
        self._save(state, unmasked_sha256=sha256)
        return state.advert

    def share(self, terms: SumTerms, adverts: Sequence[Signed]) -> tuple[Signed, ...]:
        before = self._begun(terms.attempt)
        state = self._member(terms).share(before, adverts, terms.oldest)
        self._save_changed(before, state)
        return state.shares_out

    def mask(self, terms: SumTerms, sharers: Sequence[str], shares: Sequence[Signed]) -> MaskedUpload:
        state = self._begun(terms.attempt)
        if state.upload is not None:
            self._restore(terms, state)
            return self._upload(terms, state)
        member = self._member(terms)
        state = member.receive(state, sharers, shares)
        sha256, segments = self._write_masked(terms, state)
        layout = terms.layout
        state = member.commit(state, layout.params.name, layout.lanes, layout.vector_length, sha256, segments)
        self._pending[terms.attempt] = state
        return self._upload(terms, state)

    def keep(self, upload: MaskedUpload) -> None:
        state = self._pending.pop(upload.attempt, None)
        if state is not None:
            self._save(state, ciphertext_sha256=self._signed_upload(state).ciphertext_sha256)

    def settle(self, upload: MaskedUpload) -> None:
        self._store.settle(upload.attempt)

    def confirm(self, terms: SumTerms, survivors: bytes) -> bytes:
        return self._confirmed(terms, survivors).confirmation

    def reveal(self, terms: SumTerms, survivors: bytes, confirmations: Mapping[str, bytes]) -> Signed:
        before = self._begun(terms.attempt)
        member = self._member(terms)
        if before.reveal is None and self._store.revealed_elsewhere(terms.attempt):
            raise FedmeshError(Code.EQUIVOCATION, "this hospital revealed in another attempt of the round already")
        state = member.reveal(member.confirm(before, survivors), confirmations)
        self._save_changed(before, state)
        assert state.reveal is not None
        return state.reveal

    def check(self, terms: SumTerms, task: Task) -> SumCheck:
        state = self._confirmed(terms, task.survivors)
        uploads = opening.check_listed(state.survivors, terms.roster, task.uploads)
        _require_form(uploads, terms.layout)
        statement = parse(Survivors, state.survivors)
        keys = opening.mask_keys(state.adverts, terms.roster, statement.sharers)
        correction = opening.correction(terms.attempt.ref, keys, statement.ids, task.opening)
        return SumCheck(terms, uploads, correction)

    def verify_segment(self, check: SumCheck, index: int, segments: Mapping[str, bytes], claimed: bytes) -> None:
        terms, own = check.terms, self._keys.hospital_id
        state = self._begun(terms.attempt)
        received = {**segments, own: self._own_segment(terms, state, index)}
        for name, upload in check.uploads.items():
            if hashlib.sha256(received[name]).hexdigest() != _segment_sha256(upload, index):
                raise _blame(f"segment {index} of {name}'s upload is not the one that {name} signed")
        correction = masks.of_segment(check.correction, terms.layout, index)
        try:
            expected = public.sum_segment(
                terms.layout, index, [received[name] for name in sorted(check.uploads)], correction
            )
        except FedmeshError as error:
            raise _blame(f"segment {index} of an upload is no ciphertext, though it is in the sum") from error
        if claimed != expected:
            raise _blame(f"segment {index} of the sum is not the sum of the uploads without their masks")

    def decrypt(self, check: SumCheck, encrypted_sum: IO[bytes]) -> Int64Vector:
        layout = check.terms.layout
        encrypted_sum.seek(0)
        segments = (encrypted_sum.read(layout.sum_segment_bytes(index)) for index in range(layout.segments))
        return secret.decrypt_segments(segments, check.terms.require_group_key(), layout)

    def agree(
        self, check: SumCheck, sum_sha256: str, total: Int64Vector, next_state_sha256: str
    ) -> tuple[bytes, Signed]:
        terms = check.terms
        attempt = terms.attempt
        context = secret.round_context(attempt.job_id, attempt.round, attempt.attempt)
        digest = secret.keyed_digest(terms.require_group_key(), context, bytes.fromhex(sum_sha256), total)
        before = self._begun(attempt)
        state = self._member(terms).agree(before, sum_sha256, digest, next_state_sha256)
        self._save_changed(before, state)
        assert state.digest is not None
        return digest, state.digest

    def finish(self, attempt: AttemptId) -> None:
        self._forget([other for other in self._states if other.job_id == attempt.job_id and other <= attempt])
        self._store.finish_before(attempt, inclusive=True)

    def finish_job(self, job_id: str) -> None:
        self._forget([other for other in self._states if other.job_id == job_id])
        self._store.finish_job(job_id)

    # ---- states

    def _member(self, terms: SumTerms) -> Member:
        return Member(self._keys, terms.roster)

    def _state(self, attempt: AttemptId) -> MemberState | None:
        if attempt not in self._states:
            stored = self._store.state(attempt)
            if stored is None:
                return None
            self._remember(attempt, stored)
        return self._states[attempt]

    def _begun(self, attempt: AttemptId) -> MemberState:
        state = self._state(attempt)
        if state is None:
            raise FedmeshError(Code.WRONG_STATE, "this hospital has no secrets of this attempt: it sits this one out")
        return state

    def _confirmed(self, terms: SumTerms, survivors: bytes) -> MemberState:
        before = self._begun(terms.attempt)
        state = self._member(terms).confirm(before, survivors)
        self._save_changed(before, state)
        return state

    def _save_changed(self, before: MemberState, state: MemberState) -> None:
        if state is not before:
            self._save(state)

    def _save(self, state: MemberState, *, unmasked_sha256: str = "", ciphertext_sha256: str = "") -> None:
        self._store.save_state(state, unmasked_sha256=unmasked_sha256, ciphertext_sha256=ciphertext_sha256)
        named = state.attempt
        self._remember(AttemptId(named.job_id, named.round, named.attempt), state)

    def _remember(self, attempt: AttemptId, state: MemberState) -> None:
        self._states.pop(attempt, None)
        self._states[attempt] = state
        while len(self._states) > _MOST_REMEMBERED:
            self._forget({next(iter(self._states))})

    def _forget(self, attempts: Iterable[AttemptId]) -> None:
        for attempt in attempts:
            self._states.pop(attempt, None)
            self._pending.pop(attempt, None)

    # ---- ciphertexts

    def _write_masked(self, terms: SumTerms, state: MemberState) -> tuple[str, list[str]]:
        """Mask segment by segment; SHA-256 of the whole and of each segment, hex."""
        layout, plan = terms.layout, self._member(terms).mask_plan(state)
        whole, segments = hashlib.sha256(), list[str]()

        def masked() -> Iterator[bytes]:
            for index, prepared in enumerate(self._store.unmasked(terms.attempt, _prepared_sizes(layout))):
                end = layout.upload_segment_bytes(index)
                values = np.frombuffer(prepared, dtype="<i8", offset=end)
                mask = masks.of_segment(plan, layout, index)
                made = public.add_masked(layout, index, prepared[:end], values, mask)
                whole.update(made)
                segments.append(hashlib.sha256(made).hexdigest())
                yield made

        self._store.write_masked(terms.attempt, masked())
        return whole.hexdigest(), segments

    def _restore(self, terms: SumTerms, state: MemberState) -> None:
        """Make sure that the masked ciphertext is the one that was signed for; after a crash it is made again.

        Raises: FedmeshError(WRONG_STATE) when it is lost for good.
        """
        upload = self._signed_upload(state)
        try:
            for _ in self._store.masked(terms.attempt, _sizes(terms.layout), upload.ciphertext_sha256):
                pass
        except FedmeshError:
            sha256, _ = self._write_masked(terms, state)
            if sha256 != upload.ciphertext_sha256:
                raise

    def _upload(self, terms: SumTerms, state: MemberState) -> MaskedUpload:
        assert state.upload is not None
        sha256 = self._signed_upload(state).ciphertext_sha256
        read = partial(self._store.masked, terms.attempt, tuple(_sizes(terms.layout)), sha256)
        return MaskedUpload(terms.attempt, terms.layout, state.upload, sha256, read)

    def _own_segment(self, terms: SumTerms, state: MemberState, index: int) -> bytes:
        sha256 = self._signed_upload(state).ciphertext_sha256
        for found, segment in enumerate(self._store.masked(terms.attempt, _sizes(terms.layout), sha256)):
            if found == index:
                return segment
        raise FedmeshError(Code.WRONG_STATE, "the ciphertext of this attempt is lost: its sum cannot be checked")

    @staticmethod
    def _signed_upload(state: MemberState) -> Upload:
        if state.upload is None:
            raise FedmeshError(Code.WRONG_STATE, "this hospital uploaded nothing in this attempt")
        return parse(Upload, state.upload.statement)


def _encryptor(terms: SumTerms) -> Encryptor:
    """Under a set with a public key, one that holds nothing that decrypts."""
    if terms.layout.params.public_key:
        return PublicEncryptor(terms.keys.require_public_key())
    return secret.SecretEncryptor(terms.require_group_key())


def _require_form(uploads: Mapping[str, Upload], layout: Layout) -> None:
    """Refuse a list with an upload of another form than the plan's: the aggregator should have."""
    expected = (layout.params.name, layout.lanes, layout.vector_length)
    for name, upload in uploads.items():
        if (upload.parameter_set, upload.lanes, upload.vector_length) != expected:
            raise _blame(f"{name}'s upload is of {upload.parameter_set}, or of another form than the plan's")


def _sizes(layout: Layout) -> Iterable[int]:
    return (layout.upload_segment_bytes(index) for index in range(layout.segments))


def _prepared(layout: Layout, zeros: Iterable[bytes], values: Int64Vector) -> Iterator[bytes]:
    """By segment: a ciphertext of zero, then the values. They meet only under the mask: see `public.add_masked`."""
    for index, segment in enumerate(zeros):
        start, count = layout.values(index)
        yield segment + values[start : start + count].astype("<i8", copy=False).tobytes()


def _prepared_sizes(layout: Layout) -> Iterable[int]:
    return (layout.upload_segment_bytes(index) + 8 * layout.values(index)[1] for index in range(layout.segments))


def _segment_sha256(upload: Upload, index: int) -> str:
    return upload.segments[index] if index < len(upload.segments) else ""


def _blame(what: str) -> FedmeshError:
    return FedmeshError(Code.CIPHERTEXT_INVALID, f"the aggregator is to blame: {what}", culprit="aggregator")
