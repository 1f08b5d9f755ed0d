"""A hospital pulls a promoted model from a real registry and a real log; what does not hold is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedmesh.registry.v1 import promotion_pb2 as pm
from fedmesh.registry.v1 import registry_pb2 as pb

from services.cli.pull import fetch, write
from services.cli.receipts import Asker
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import call
from services.common.ids import new_id
from services.hospital_node.store.epochs import EpochFiles
from services.hospital_node.training.export import NUMPY_FILE, export_keras
from services.hospital_node.training.state import State
from services.hospital_node.usecases.states import seal
from services.registry.domain.events import PROMOTION_TYPES
from services.secure_sum.epoch import make_epoch
from services.transparency.attestation import VERDICT_PREDICATE, open_statement, sign_statement
from services.transparency.checkpoint import SigningKey, generate_key, load_signing_key
from services.transparency.provenance import Claim, Logged, verify_claim
from tests.integration.registry.consortium import Consortium
from tests.integration.registry.harness import CONSORTIUM, HOSPITALS, Registry, keys, manifest
from tests.integration.registry.test_promotion import (
    ROUNDS,
    a_job,
    approving,
    charge,
    checking,
    findings,
    proposing,
    run,
)
from tests.integration.registry.test_receipts import ME

PLAN = manifest(True, ROUNDS)


def a_state() -> bytes:
    average = np.linspace(-1, 1, PLAN.weights_length).astype(np.float32)
    return State(2, average, np.zeros_like(average), average).to_bytes()


def puller(world: Consortium) -> Asker:
    asker = world.asker(ME)
    (world.folder / "registry.vkey").write_text(
        f"{load_signing_key(world.folder / 'ca' / 'statements.key').verifier}\n"
    )
    return replace(asker, config=asker.config.model_copy(update={"registry_key": world.folder / "registry.vkey"}))


async def promoted(world: Consortium) -> pb.Job:
    """A job whose last version, a real sealed state, was promoted by two people."""
    registry = world.registry
    roster = await registry.found(*HOSPITALS)
    epoch_keys, _ = make_epoch(keys(HOSPITALS[0]), roster, 1)
    (world.folder / ME).mkdir(exist_ok=True)
    EpochFiles(world.folder / ME).save(epoch_keys)
    job = await a_job(registry)
    for version in range(1, ROUNDS + 1):
        sealed = seal(epoch_keys, job.job_id, version, a_state())
        job = await registry.commit(job, version, sealed.sealed, metrics_json='{"auroc":0.65}')
    await charge(registry, job)
    for name in HOSPITALS:
        said = findings(job, name, job.state_sha256)
        await call(registry.promotion(name, "hospital").ReportChecks, checking(said))
    proposed = (await call(registry.promotion().ProposePromotion, proposing(job))).promotion
    await call(registry.promotion("bob").ApprovePromotion, approving(proposed.promotion_id))
    return job


async def test_a_hospital_pulls_what_holds_and_nothing_else(consortium: Consortium, tmp_path: Path) -> None:
    registry, job = consortium.registry, await promoted(consortium)
    asker = puller(consortium)
    await registry.drained()
    with pytest.raises(FedmeshError, match="0 entries are witnessed: come again"):
        await fetch(asker, "production")
    await consortium.witness(*HOSPITALS[:4])
    pulled = await fetch(asker, "production")
    assert (pulled.claim.job_id, pulled.claim.version, pulled.state) == (job.job_id, ROUNDS, a_state())
    write(pulled, tmp_path / "model", keras=False)
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        *("statement.json", "verdict.json", "plan.json", "lineage.json", "features.json", NUMPY_FILE),
    }
    with np.load(tmp_path / "model" / NUMPY_FILE) as model:
        assert tuple(model["features"]) == PLAN.feature_names
        np.testing.assert_allclose(
            [*model["weights"], model["intercept"]], np.linspace(-1, 1, PLAN.weights_length), 1e-6
        )
    with pytest.raises(FedmeshError, match="was not promoted"):
        await fetch(asker, f"{job.job_id}/2")
    await _require_refusals(registry, asker, pulled.claim, consortium.folder)


async def test_the_real_audit_log_takes_every_kind_of_event_of_promotion(consortium: Consortium) -> None:
    registry, job = consortium.registry, await promoted(consortium)
    tagging = pm.SetTagRequest(request_id=new_id(), job_id=job.job_id, version=1, key="reviewed", value="yes")
    await call(registry.promotion().SetTag, tagging)
    worse = await run(registry, await a_job(registry), 0.60, 0.64, 0.58)
    assert worse.reason.startswith("diverged, version 1 is the result")
    await registry.drained()
    kept = registry.sql("select type, refusal from registry.outbox")
    assert {kind for kind, _ in kept} >= PROMOTION_TYPES
    assert [refusal for _, refusal in kept if refusal] == []


def set_aside(claim: Claim, key: SigningKey, failed: str, **waived: str) -> dict[str, Any]:
    """The registry's verdict, with a check that failed and what is said to be set aside."""
    told = open_statement(claim.verdict, key.verifier, VERDICT_PREDICATE)
    checks = {**told.predicate["checks"], failed: {**told.predicate["checks"][failed], "outcome": "failed"}}
    predicate = {**told.predicate, "checks": checks, "waived": waived}
    return {"verdict": sign_statement(replace(told, predicate=predicate), key)}


def altered(entry: Logged, old: bytes, new: bytes) -> Logged:
    assert old in entry.leaf
    return replace(entry, leaf=entry.leaf.replace(old, new))


async def _require_refusals(registry: Registry, asker: Asker, claim: Claim, folder: Path) -> None:
    """Every link, broken by itself."""
    log, key = asker.verifier, load_signing_key(folder / "ca" / "statements.key").verifier
    attested, moved = claim.attested, claim.moved
    assert verify_claim(claim, key, log).sha256 == claim.state_sha256
    generate_key(folder / "other.key", f"{CONSORTIUM}/registry")
    with pytest.raises(FedmeshError, match="not signed by consortium"):
        verify_claim(claim, load_signing_key(folder / "other.key").verifier, log)
    signing = load_signing_key(folder / "ca" / "statements.key")
    verify_claim(replace(claim, **set_aside(claim, signing, "divergence", divergence="noise")), key, log)
    wrong: list[tuple[dict[str, Any], str]] = [
        (set_aside(claim, signing, "divergence"), "checks that had not passed: divergence"),
        (set_aside(claim, signing, "divergence", divergence=""), "for no reason"),
        (set_aside(claim, signing, "subgroups", subgroups="because"), "that nobody may"),
        (set_aside(claim, signing, "subgroups", divergence="noise"), "checks that had not passed: subgroups"),
        ({"state_sha256": "a" * 64}, "not about version 3"),
        ({"version": 2}, "not about version 2"),
        ({"plan": claim.plan + b" "}, "not the one that the statement names"),
        ({"attested": replace(attested, leaf=b"{}")}, "tells of no model version"),
        ({"attested": altered(attested, b"model.attested", b"model.attester")}, "the version is not in the log"),
        ({"attested": altered(attested, b'"occurred_at":"2', b'"occurred_at":"1')}, "proof"),
        ({"attested": replace(attested, place=replace(attested.place, index=attested.place.index - 1))}, "proof"),
        ({"attested": moved}, "tells of no model version"),
        ({"alias": "candidate"}, "tells of candidate moving to this version"),
        ({"moved": attested}, "tells of no model version"),
        ({"moved": altered(moved, b"alias.moved", b"alias.moves")}, "the move is not in the log"),
        ({"moved": altered(moved, b"operator/bob", b"operator/eve")}, "the move is not in the log"),
        ({"moved": altered(moved, b'"occurred_at":"2', b'"occurred_at":"1')}, "proof"),
        ({"moved": replace(moved, place=replace(moved.place, index=moved.place.index - 1))}, "proof"),
        ({"checkpoint": "\n".join(claim.checkpoint.split("\n")[:6]) + "\n"}, "not witnessed"),
        ({"approved_by": claim.proposed_by}, "no two people"),
        ({"verdict": claim.envelope}, "the statement is of type"),
        ({"reports": claim.reports[:3]}, "fewer than 4 hospitals signed"),
        ({"reports": (replace(claim.reports[0], signature=bytes(64)), *claim.reports[1:])}, "not signed by"),
        ({"rosters": claim.rosters[:0]}, "none that hospitals signed"),
    ]
    for changes, reason in wrong:
        with pytest.raises(FedmeshError, match=reason) as refused:
            verify_claim(replace(claim, **changes), key, log)
        assert refused.value.code in (Code.PROOF_INVALID, Code.STATEMENT_INVALID)

    # A superuser of the registry's database changes one byte of the sealed state.
    registry.sql(
        "update registry.blob_chunks set content = set_byte(content, 40, 255 - get_byte(content, 40))"
        " where sha256 = %s",
        claim.state_sha256,
    )
    with pytest.raises(FedmeshError, match="the sealed state was tampered with"):
        await fetch(asker, "production")
    with pytest.raises(FedmeshError, match="no `registry_key`"):
        await fetch(replace(asker, config=asker.config.model_copy(update={"registry_key": None})), "production")


@pytest.mark.slow
def test_keras_and_saved_model_give_the_plans_probabilities(tmp_path: Path) -> None:
    import tensorflow as tf

    from services.hospital_node.training.trainer import predict

    keras, saved = export_keras(PLAN, a_state(), tmp_path)
    x = np.random.default_rng(0).normal(size=(20, len(PLAN.feature_names))).astype(np.float32)
    expected = predict(PLAN, a_state(), x)
    np.testing.assert_allclose(tf.keras.models.load_model(keras).predict(x, verbose=0)[:, 0], expected, atol=1e-6)
    served = tf.saved_model.load(str(saved))
    np.testing.assert_allclose(served.serve(x).numpy()[:, 0], expected, atol=1e-6)
