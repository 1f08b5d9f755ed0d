"""The hospital tells the registry what its ledger says, and spends nothing when it is an older copy of it."""

import json
import shutil
from pathlib import Path
from typing import Any

from fedmesh.coordinator.v1 import coordinator_pb2 as pb
from prometheus_client import REGISTRY

from services.common.clock import SystemClock
from services.common.errors import Code, FedmeshError
from services.hospital_node.recovery import Evidence, recover_ledger
from services.hospital_node.store.ledger import read_ledger
from services.privacy.chain import Head, next_entry
from services.secure_sum.roster import MemberKeys, sign_roster, succeed, verify_successor
from tests.integration.hospital_node.conftest import Consortium
from tests.support.hospital import changed_plan

H1 = "h1"


def kinds(consortium: Consortium) -> list[str]:
    return [json.loads(entry.body)["kind"] for entry in consortium.centre.ledgers.get(H1, [])]


async def uploaded(consortium: Consortium, **where: Any) -> None:
    await consortium.trained([H1], **where)
    await consortium.uploaded([H1], **where)


def differing() -> float | None:
    return REGISTRY.get_sample_value("fedmesh_hospital_ledger_differs")


async def test_every_charge_is_reported_also_after_the_registry_was_away(consortium: Consortium) -> None:
    consortium.create_job()
    await consortium.start([H1])
    await uploaded(consortium)
    await consortium.centre.until(lambda: kinds(consortium) == ["reserved", "charged"], "the first charge")
    last = consortium.centre.ledgers[H1][-1]
    key = consortium.keys[H1].public().signing_key
    assert last.head.signed_by(H1, key, consortium.centre.ledger_signatures[H1])
    away: list[Exception] = [FedmeshError(Code.STORE_UNAVAILABLE, "away") for _ in range(3)]
    consortium.centre.faults.before["ReportLedger"] = away
    await uploaded(consortium, attempt=2)
    await consortium.centre.until(lambda: len(kinds(consortium)) == 3, "the charge after the outage")
    assert away == []
    assert differing() == 0


async def test_a_node_that_stops_reports_what_it_charged_last(consortium: Consortium) -> None:
    consortium.create_job()
    await consortium.start([H1])
    await uploaded(consortium)
    await consortium.nodes[H1].stop()
    assert kinds(consortium) == ["reserved", "charged"]


async def test_an_older_copy_of_everything_spends_nothing(consortium: Consortium, tmp_path: Path) -> None:
    """Ledger and second head are put back to an older state together: only the registry can tell."""
    home = consortium.nodes[H1].config.data_dir
    consortium.create_job()
    await consortium.start([H1])
    await uploaded(consortium)
    await consortium.centre.until(lambda: len(kinds(consortium)) == 2, "the first charge")
    await consortium.nodes[H1].kill()
    shutil.copytree(home, tmp_path / "backup")
    await consortium.restart(H1)
    await uploaded(consortium, attempt=2)
    await consortium.centre.until(lambda: len(kinds(consortium)) == 3, "the second charge")
    await consortium.nodes[H1].kill()
    newest = tmp_path / "newest"
    home.rename(newest)
    shutil.copytree(tmp_path / "backup", home)
    assert read_ledger(home)[0].charged == 1
    await consortium.restart(H1)
    consortium.tell([H1], consortium.task(pb.TASK_KIND_TRAIN, attempt=3))
    declined = (await consortium.centre.reported("decline", [H1]))[H1]
    assert declined.code == Code.CONFIG_INVALID.value
    assert "ends with entry 2, and entry 3" in declined.reason
    assert differing() == 1
    # The registry was shown the older head, and so has it in its audit trail.
    shown = [request for name, kind, request in consortium.centre.reports if kind == "ledger" and name == H1]
    assert shown[-1].head.seq == 2
    assert read_ledger(home)[0].charged == 1
    # The newest copy comes back, and all is well.
    await consortium.nodes[H1].kill()
    shutil.rmtree(home)
    newest.rename(home)
    consortium.centre.reports.clear()
    await consortium.restart(H1)
    await uploaded(consortium, attempt=3)
    await consortium.centre.until(lambda: len(kinds(consortium)) == 4, "the third charge")
    assert differing() == 0


async def test_a_registry_that_makes_up_a_ledger_is_not_believed(consortium: Consortium) -> None:
    """Its head is not signed by this hospital: the hospital's own ledger is authoritative."""
    forged = next_entry(Head(), "released", "2026-01-01T00:00:00+00:00", job_id="none")
    consortium.centre.ledgers[H1] = [forged]
    consortium.centre.ledger_signatures[H1] = consortium.keys["h2"].signing.sign(forged.head.to_sign(H1))
    consortium.create_job()
    await consortium.start([H1])
    await uploaded(consortium)
    assert differing() == 1
    assert read_ledger(consortium.nodes[H1].config.data_dir)[0].charged == 1


async def test_a_ledger_that_is_lost_for_good_is_recovered_and_spends_nothing_twice(consortium: Consortium) -> None:
    node = consortium.nodes[H1]
    consortium.create_job()
    await consortium.start([H1])
    await uploaded(consortium)
    await consortium.centre.until(lambda: len(kinds(consortium)) == 2, "the first charge")
    await node.kill()
    shutil.rmtree(node.config.data_dir)
    await consortium.restart(H1)
    consortium.tell([H1], consortium.task(pb.TASK_KIND_TRAIN, attempt=2))
    declined = (await consortium.centre.reported("decline", [H1]))[H1]
    assert (declined.code, "LedgerLost.md" in declined.reason) == (Code.CONFIG_INVALID.value, True)
    await node.kill()
    spent = Evidence(all_spent=True)
    seen = await recover_ledger(node.config, spent, SystemClock(), write=False)
    assert (seen.reported.head.seq, seen.recovery.epsilon, seen.done) == (2, 100.0, None)
    assert read_ledger(node.config.data_dir) == []
    done = (await recover_ledger(node.config, spent, SystemClock(), write=True)).done
    assert done is not None
    assert kinds(consortium) == ["reserved", "charged", "recovered"]
    consortium.centre.reports.clear()
    await consortium.restart(H1)
    consortium.tell([H1], consortium.task(pb.TASK_KIND_TRAIN, attempt=2))
    declined = (await consortium.centre.reported("decline", [H1]))[H1]
    assert (declined.code, "lost and recovered" in declined.reason) == (Code.PRIVACY_REFUSED.value, True)
    assert differing() == 0
    consortium.centre.reports.clear()
    consortium.create_job()
    consortium.tell([H1], consortium.task(pb.TASK_KIND_TRAIN))
    declined = (await consortium.centre.reported("decline", [H1]))[H1]
    assert declined.code == Code.BUDGET_EXHAUSTED.value


def replace_keys(consortium: Consortium, path: Path) -> None:
    """A roster that lists other keys of the hospital, signed by the others; its node has them when it starts again."""
    consortium.keys[H1] = MemberKeys.generate(H1)
    consortium.keys[H1].save(path)
    consortium.reconfigure(H1, member_keys=path)
    statement = succeed(consortium.roster, [keys.public() for keys in consortium.keys.values()])
    signatures = {name: sign_roster(statement, consortium.keys[name]) for name in consortium.roster.ids if name != H1}
    consortium.roster = verify_successor(consortium.roster, statement, signatures)
    consortium.centre.publish_roster(consortium.roster, statement, signatures)
    consortium.create_job()


async def test_a_founding_member_under_new_keys_goes_on_with_its_ledger_and_spends_nothing_without(
    consortium: Consortium, tmp_path: Path
) -> None:
    node = consortium.nodes[H1]
    consortium.reconfigure(H1, privacy={"allow_without_privacy": True})
    consortium.create_job(changed_plan("readmission-logistic"))
    await consortium.start([H1])
    await uploaded(consortium)
    await consortium.centre.until(lambda: len(kinds(consortium)) == 2, "the first charge")
    await node.kill()
    replace_keys(consortium, tmp_path / "second.keys")
    await consortium.restart(H1)
    await uploaded(consortium)
    await consortium.centre.until(lambda: len(kinds(consortium)) == 4, "the charge under new keys")
    head, signature = consortium.centre.ledgers[H1][-1].head, consortium.centre.ledger_signatures[H1]
    assert head.signed_by(H1, consortium.keys[H1].public().signing_key, signature)
    assert differing() == 0
    await node.kill()
    shutil.rmtree(node.config.data_dir)
    replace_keys(consortium, tmp_path / "third.keys")
    await consortium.restart(H1)
    consortium.tell([H1], consortium.task(pb.TASK_KIND_TRAIN))
    declined = (await consortium.centre.reported("decline", [H1]))[H1]
    assert declined.code == Code.CONFIG_INVALID.value
    assert "it was a member before" in declined.reason
    assert differing() == 1
    assert read_ledger(node.config.data_dir) == []
    # The registry was shown the empty ledger, and so has it in its audit trail.
    shown = [request for name, kind, request in consortium.centre.reports if kind == "ledger" and name == H1]
    assert shown[-1].head.seq == 0
