"""What everybody can check without a secret: adverts, shares, uploads, survivors, reveals; and the opening of masks.

The centre runs these on what hospitals send and hospitals on what the centre passes on. An error whose fault can be
told carries `culprit` in its detail. Raises FedmeshError(STATEMENT_INVALID) where nothing else is said.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from services.common.errors import Code, FedmeshError
from services.secure_sum import derive, shares
from services.secure_sum.derive import MaskPlan, ShareKind
from services.secure_sum.roster import Roster
from services.secure_sum.statements import (
    Advert,
    AttemptRef,
    Digest,
    EpochStatement,
    Reveal,
    Share,
    Signed,
    Signers,
    Survivor,
    Survivors,
    Upload,
    adverts_digest,
    open_signed,
    parse,
    sharers_digest,
    verify,
)


@dataclass(frozen=True)
class Opening:
    """What removes the masks from a sum: the self seed of every survivor, the mask seed of every dropped sharer."""

    self_seeds: Mapping[str, bytes] = field(repr=False)
    mask_seeds: Mapping[str, bytes] = field(repr=False)


@dataclass(frozen=True)
class MaskKey:
    """What a sharer advertised, as far as an opening is checked against it."""

    hospital_id: str
    position: int
    """In the roster, from 1."""
    mask_key: bytes
    """X25519 public key, 32 bytes."""
    seed_commitment: bytes
    """32 bytes."""


def check_epoch(signed: Signed, roster: Roster) -> EpochStatement:
    """A member's publication of an epoch of this roster, with a box for at least t members, its maker among them.

    Members that are suspended get none. Raises: FedmeshError(STATEMENT_INVALID).
    """
    statement = open_signed(EpochStatement, signed, roster)
    if statement.roster != roster.sha256:
        _refuse("the epoch belongs to another roster", statement.maker)
    sealed_to = {box.to for box in statement.boxes}
    if not sealed_to <= set(roster.ids) or statement.maker not in sealed_to:
        _refuse("the epoch's keys are sealed to strangers, or not to their maker", statement.maker)
    if len(sealed_to) < roster.threshold:
        _refuse("the epoch's keys are sealed to too few members", statement.maker)
    return statement


def check_advert(signed: Signed, roster: Roster, attempt: AttemptRef, epoch: int, oldest: int = 0) -> Advert:
    """A member's advert for this attempt, with two fit keys. oldest: the greatest age of a contribution."""
    advert = open_signed(Advert, signed, roster)
    if (advert.roster, advert.epoch, advert.attempt) != (roster.sha256, epoch, attempt):
        _refuse("the advert is for another roster, epoch or attempt", advert.hospital_id)
    # There are as many versions before a round as rounds.
    if advert.age > min(oldest, attempt.round - 1):
        _refuse(f"the advert is for a contribution of age {advert.age}, more than {oldest}", advert.hospital_id)
    for public in (advert.mask_key, advert.transport_key):
        derive.require_public_key(bytes.fromhex(public), advert.hospital_id)
    return advert


def check_group(
    adverts: Sequence[Signed], roster: Roster, attempt: AttemptRef, epoch: int, cohort: Iterable[str], oldest: int = 0
) -> dict[str, Advert]:
    """The adverts of a sealed group by hospital: at least t members of the cohort, no key or commitment twice.

    Check a new advert together with those before it, so that a copied key is refused when it comes.

    Raises: FedmeshError(PRIVACY_REFUSED) when there are fewer than t.
    """
    if len(adverts) > roster.size:
        _refuse("there are more adverts than members")
    group = {signed.hospital_id: check_advert(signed, roster, attempt, epoch, oldest) for signed in adverts}
    if len(group) != len(adverts):
        _refuse("a hospital advertised twice")
    if not group.keys() <= set(cohort):
        _refuse("a hospital of the group is not in the cohort")
    require_distinct(group.values())
    require_threshold(len(group), roster, "the group")
    return group


def require_distinct(adverts: Iterable[Advert]) -> None:
    """Refuse adverts in which a value occurs twice; `hospitals` in the detail names both that have it."""
    owners: dict[str, str] = {}
    for advert in adverts:
        for value in (advert.mask_key, advert.transport_key, advert.seed_commitment):
            if value in owners:
                raise FedmeshError(
                    Code.STATEMENT_INVALID,
                    f"{advert.hospital_id} advertised what {owners[value]} advertised already",
                    hospitals=f"{owners[value]},{advert.hospital_id}",
                )
            owners[value] = advert.hospital_id


def require_threshold(number: int, roster: Roster, what: str) -> None:
    """Raises: FedmeshError(PRIVACY_REFUSED) below t."""
    if number < roster.threshold:
        raise FedmeshError(
            Code.PRIVACY_REFUSED,
            f"{what} has {number} hospitals, {roster.threshold} of the roster's {roster.size} are needed",
            threshold=roster.threshold,
        )


def check_shares(
    signed: Sequence[Signed], roster: Roster, attempt: AttemptRef, adverts: Sequence[Signed], sender: str
) -> tuple[Share, ...]:
    """What one member of the group shares: exactly one statement for every other member of it."""
    group = {advert.hospital_id for advert in adverts}
    if sender not in group:
        _refuse("the sender is not in the group", sender)
    if len(signed) != len(group) - 1:
        _refuse(f"{len(signed)} shares for a group of {len(group)}", sender)
    digest = adverts_digest(adverts)
    dealt = tuple(_check_share(item, roster, attempt, digest, sender) for item in signed)
    if {share.recipient for share in dealt} != group - {sender}:
        _refuse("the shares are not one for every other member of the group", sender)
    return dealt


def check_received(
    signed: Sequence[Signed], roster: Roster, attempt: AttemptRef, adverts_sha256: str, recipient: str
) -> dict[str, Share]:
    """Shares from several senders to one recipient, by sender; none twice and none from itself."""
    found: dict[str, Share] = {}
    for item in signed:
        share = _check_share(item, roster, attempt, adverts_sha256, item.hospital_id)
        if share.recipient != recipient:
            _refuse("a share is for another hospital")
        if share.sender in found:
            _refuse("two shares of one sender")
        found[share.sender] = share
    return found


def _check_share(signed: Signed, roster: Roster, attempt: AttemptRef, adverts_sha256: str, sender: str) -> Share:
    share = open_signed(Share, signed, roster)
    if share.sender != sender or share.recipient == sender:
        _refuse("the share has another sender, or is for its sender", sender)
    if share.attempt != attempt or share.adverts != adverts_sha256:
        _refuse("the share is for another attempt or group", sender)
    return share


def check_upload(
    signed: Signed, signers: Signers, attempt: AttemptRef, adverts_sha256: str, sharers: Sequence[str]
) -> Upload:
    """A sharer's upload in this attempt, for these sharers. Its form and its hashes are the aggregator's to check."""
    upload = open_signed(Upload, signed, signers)
    hospital_id = upload.hospital_id
    if hospital_id not in sharers:
        _refuse("the uploader is not among the sharers", hospital_id)
    if upload.attempt != attempt or upload.adverts != adverts_sha256 or upload.sharers != sharers_digest(sharers):
        _refuse("the upload is for another attempt, group or list of sharers", hospital_id)
    if hospital_id in upload.complaints or not set(upload.complaints) <= set(sharers):
        _refuse("the upload complains about a hospital that sent it no share", hospital_id)
    return upload


def survivors_statement(
    roster: Roster,
    epoch: int,
    attempt: AttemptRef,
    adverts: Sequence[Signed],
    sharers: Sequence[str],
    uploads: Mapping[str, Signed],
) -> bytes:
    """The list for the survivors to sign: everybody who uploaded.

    Raises: FedmeshError(PRIVACY_REFUSED) when fewer than t did; (WRONG_STATE) when too few of them hold good shares of
        some sharer, its `dealer`, to open the sum: the attempt must be aborted. More than f complaints about a dealer
        prove that it dealt badly, and it is the `culprit`.
    """
    digest = adverts_digest(adverts)
    checked: dict[str, Upload] = {}
    for hospital_id, signed in uploads.items():
        checked[hospital_id] = check_upload(signed, roster, attempt, digest, sharers)
        if signed.hospital_id != hospital_id:
            _refuse("an upload is under another hospital's name")
    require_threshold(len(checked), roster, "the list of survivors")
    _require_openable(roster, sharers, checked)
    listed = tuple(
        Survivor(hospital_id=name, upload=uploads[name].sha256, complaints=checked[name].complaints)
        for name in sorted(uploads)
    )
    return Survivors(
        roster=roster.sha256,
        epoch=epoch,
        attempt=attempt,
        adverts=digest,
        sharers=tuple(sorted(sharers)),
        survivors=listed,
    ).encode()


def _require_openable(roster: Roster, sharers: Iterable[str], uploads: Mapping[str, Upload]) -> None:
    for dealer in sharers:
        against = sum(dealer in upload.complaints for upload in uploads.values())
        if len(uploads) - against < roster.threshold:
            culprit = {"culprit": dealer} if against > roster.colluders else {}
            raise FedmeshError(
                Code.WRONG_STATE,
                f"{against} survivors hold no good shares of {dealer}: the sum could not be opened",
                dealer=dealer,
                **culprit,
            )


def check_listed(survivors: bytes, roster: Roster, uploads: Sequence[Signed]) -> dict[str, Upload]:
    """The `upload` statements that a list of survivors names, one for each of them."""
    statement = _list_of(survivors, roster)
    named = {survivor.hospital_id: survivor.upload for survivor in statement.survivors}
    if len(uploads) != len(named) or {signed.hospital_id: signed.sha256 for signed in uploads} != named:
        _refuse("these are not the uploads that the list of survivors names")
    checked = {
        signed.hospital_id: check_upload(signed, roster, statement.attempt, statement.adverts, statement.sharers)
        for signed in uploads
    }
    if {name: upload.complaints for name, upload in checked.items()} != statement.complaints:
        _refuse("the list of survivors has other complaints than the uploads")
    return checked


def check_digest(signed: Signed, roster: Roster, survivors: bytes) -> Digest:
    """What a survivor says about the sum over this list of survivors."""
    statement = _list_of(survivors, roster)
    said = open_signed(Digest, signed, roster)
    if said.hospital_id not in statement.ids:
        _refuse("only a survivor submits a digest", said.hospital_id)
    if said.attempt != statement.attempt or said.survivors != _sha256(survivors):
        _refuse("the digest is for another list of survivors", said.hospital_id)
    return said


def check_confirmation(survivors: bytes, roster: Roster, hospital_id: str, signature: bytes) -> None:
    """A survivor's signature over the list of survivors."""
    _check_confirmation(survivors, _list_of(survivors, roster), roster, hospital_id, signature)


def check_confirmed(survivors: bytes, roster: Roster, confirmations: Mapping[str, bytes]) -> Survivors:
    """The list of survivors, confirmed by at least t of them. One bad signature among them refuses all.

    Raises: FedmeshError(PRIVACY_REFUSED) below t.
    """
    statement = _list_of(survivors, roster)
    if len(confirmations) > len(statement.ids):
        _refuse("there are more confirmations than survivors")
    for hospital_id, signature in confirmations.items():
        _check_confirmation(survivors, statement, roster, hospital_id, signature)
    require_threshold(len(confirmations), roster, "the list of confirmations")
    return statement


def _check_confirmation(
    survivors: bytes, statement: Survivors, roster: Roster, hospital_id: str, signature: bytes
) -> None:
    if hospital_id not in statement.ids:
        _refuse("only a survivor confirms the list of survivors", hospital_id)
    verify(survivors, hospital_id, signature, roster)


def _list_of(survivors: bytes, roster: Roster) -> Survivors:
    statement = parse(Survivors, survivors)
    if statement.roster != roster.sha256:
        _refuse("the list of survivors is for another roster")
    for name in statement.sharers:
        roster.position(name)
    require_threshold(len(statement.ids), roster, "the list of survivors")
    return statement


def check_reveal(signed: Signed, roster: Roster, survivors: bytes, shared: Sequence[Signed]) -> Reveal:
    """What a survivor reveals: of every sharer, except those it complained about, one share, of the kind that the list
    allows, as its dealer committed to it.

    `shared` are `share` statements of the attempt, at least those for the revealer. A hospital's share of its own seed
    was never committed to; a wrong one shows when its seed is opened. The error's `culprit` is the revealer.
    """
    statement = _list_of(survivors, roster)
    reveal = _open_reveal(signed, roster, survivors, statement)
    sender = reveal.sender
    committed = {}
    for item in shared:
        share = parse(Share, item.statement)
        if share.recipient == sender:
            committed[share.sender] = item
    for revealed in reveal.shares:
        if revealed.of == sender:
            continue
        if revealed.of not in committed:
            _refuse(f"{sender} revealed a share that it was not sent", sender)
        said = _check_share(committed[revealed.of], roster, statement.attempt, statement.adverts, revealed.of)
        commitment = said.self_commitment if revealed.kind == "self" else said.mask_commitment
        share_bytes = bytes.fromhex(revealed.share)
        if derive.share_commitment(statement.attempt, revealed.of, sender, revealed.kind, share_bytes) != commitment:
            _refuse(f"{sender} revealed a share of {revealed.of} that is not the one it was sent", sender)
    return reveal


def _open_reveal(signed: Signed, roster: Roster, survivors: bytes, statement: Survivors) -> Reveal:
    reveal = open_signed(Reveal, signed, roster)
    sender = reveal.sender
    if sender not in statement.ids:
        _refuse("only a survivor reveals", sender)
    if reveal.attempt != statement.attempt or reveal.survivors != _sha256(survivors):
        _refuse("the reveal is for another list of survivors", sender)
    kinds = allowed_kinds(statement)
    for absent in statement.complaints[sender]:
        del kinds[absent]
    if {revealed.of: revealed.kind for revealed in reveal.shares} != kinds:
        _refuse(f"{sender} did not reveal exactly the shares that this list of survivors asks for", sender)
    return reveal


def allowed_kinds(statement: Survivors) -> dict[str, ShareKind]:
    """Which secret of every sharer a list of survivors opens; never both of one."""
    survived = set(statement.ids)
    return {name: "self" if name in survived else "mask" for name in statement.sharers}


def open_masks(roster: Roster, survivors: bytes, adverts: Sequence[Signed], reveals: Sequence[Signed]) -> Opening:
    """Reconstruct the seeds from reveals that passed `check_reveal`, and hold each against its advert.

    Raises: FedmeshError(WRONG_STATE) while some secret has fewer than t shares; (STATEMENT_INVALID) with `culprit`, the
        dealer, when shares that it committed to give a seed that its advert does not.
    """
    statement = _list_of(survivors, roster)
    if adverts_digest(adverts) != statement.adverts:
        _refuse("these are not the adverts of the list of survivors")
    held: dict[str, dict[str, bytes]] = defaultdict(dict)
    senders = set()
    for signed in reveals:
        reveal = _open_reveal(signed, roster, survivors, statement)
        if reveal.sender in senders:
            _refuse("two reveals of one survivor", reveal.sender)
        senders.add(reveal.sender)
        for revealed in reveal.shares:
            held[revealed.of][reveal.sender] = bytes.fromhex(revealed.share)
    opened = {name: _reconstruct(roster, name, held[name]) for name in statement.sharers}
    opening = Opening(
        {name: opened[name] for name in statement.ids}, {name: opened[name] for name in statement.dropped}
    )
    for known in mask_keys(adverts, roster, statement.sharers):
        _check_seed(statement.attempt, known, opening)
    return opening


def _reconstruct(roster: Roster, dealer: str, held: Mapping[str, bytes]) -> bytes:
    if len(held) < roster.threshold:
        raise FedmeshError(
            Code.WRONG_STATE,
            f"{len(held)} shares of {dealer}'s secret were revealed, {roster.threshold} are needed",
            dealer=dealer,
        )
    # The dealer's own share comes last: nobody else can vouch for it.
    holders = sorted(held, key=lambda holder: (holder == dealer, roster.position(holder)))
    return shares.combine({roster.position(holder): held[holder] for holder in holders}, roster.threshold)


def mask_keys(adverts: Sequence[Signed], roster: Roster, sharers: Iterable[str]) -> tuple[MaskKey, ...]:
    """What the sharers advertised, sorted by position. The adverts were checked before."""
    advertised = {signed.hospital_id: parse(Advert, signed.statement) for signed in adverts}
    keys = []
    for name in sorted(sharers, key=roster.position):
        if name not in advertised:
            _refuse("a sharer advertised nothing", name)
        advert = advertised[name]
        keys.append(
            MaskKey(name, roster.position(name), bytes.fromhex(advert.mask_key), bytes.fromhex(advert.seed_commitment))
        )
    return tuple(keys)


def correction(attempt: AttemptRef, keys: Sequence[MaskKey], survivors: Sequence[str], opening: Opening) -> MaskPlan:
    """The plan of all masks that the sum over `survivors` still carries; subtract it.

    `keys` are those of the sharers. Every seed is checked against them.
    """
    sharers = {known.hospital_id: known for known in keys}
    survived = set(survivors)
    if len(sharers) != len(keys) or len(survived) != len(survivors) or not survived <= sharers.keys():
        _refuse("the survivors are not a part of the sharers, each once")
    if opening.self_seeds.keys() != survived or opening.mask_seeds.keys() != sharers.keys() - survived:
        _refuse("the opening is not one seed for every sharer: self seeds of survivors, mask seeds of the others")
    plan = []
    for known in keys:
        _check_seed(attempt, known, opening)
        if known.hospital_id in survived:
            plan.append((derive.self_key(opening.self_seeds[known.hospital_id], attempt, known.hospital_id), 1))
    for dropped in sorted(opening.mask_seeds):
        private = derive.mask_key_pair(opening.mask_seeds[dropped])
        for name in sorted(survived):
            peer = sharers[name]
            pair = derive.pair_key(private, peer.mask_key, attempt, dropped, name)
            plan.append((pair, 1 if peer.position < sharers[dropped].position else -1))
    return tuple(plan)


def _check_seed(attempt: AttemptRef, known: MaskKey, opening: Opening) -> None:
    name = known.hospital_id
    if name in opening.self_seeds:
        fits = derive.seed_commitment(attempt, name, opening.self_seeds[name]) == known.seed_commitment.hex()
    else:
        private = derive.mask_key_pair(opening.mask_seeds[name])
        fits = private.public_key().public_bytes_raw() == known.mask_key
    if not fits:
        _refuse(f"the opened seed of {name} is not the one that it advertised", name)


def _sha256(statement: bytes) -> str:
    return hashlib.sha256(statement).hexdigest()


def _refuse(message: str, culprit: str | None = None) -> NoReturn:
    raise FedmeshError(Code.STATEMENT_INVALID, message, **({"culprit": culprit} if culprit else {}))
