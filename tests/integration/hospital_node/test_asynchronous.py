"""Asynchronous rounds at real nodes: results that go into a later round, are thrown away, or are never used twice."""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fedmesh.coordinator.v1 import coordinator_pb2 as pb

from services.common.errors import Code, FedmeshError
from services.hospital_node.domain.ports import Int64Vector
from services.hospital_node.store.ledger import read_ledger
from services.plans.manifest import PlanManifest
from services.plans.staleness import weight_units
from services.secure_sum.statements import Advert, parse
from tests.integration.hospital_node.conftest import HOSPITALS, Consortium
from tests.support.hospital import TIMEOUT_S, NumpyTrainer, changed_plan

FAST = HOSPITALS[:3]
SLOW = HOSPITALS[3]


class Gates:
    """Holds training of the slow hospital back. began: how often each hospital's data was trained on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.open.set()
        self.began: dict[bytes, int] = {}
        real = NumpyTrainer.contribution
        opened = NumpyTrainer.__init__

        def init(trainer: NumpyTrainer, manifest: PlanManifest, content: bytes) -> None:
            opened(trainer, manifest, content)
            trainer.content = content  # type: ignore[attr-defined]

        def contribution(trainer: NumpyTrainer, state: bytes, round_number: int) -> Int64Vector:
            content: bytes = trainer.content  # type: ignore[attr-defined]
            self.began[content] = self.began.get(content, 0) + 1
            if content == self.slow:
                self.open.wait(TIMEOUT_S)
            return real(trainer, state, round_number)

        self.slow = f"data of {SLOW}".encode()
        monkeypatch.setattr(NumpyTrainer, "__init__", init)
        monkeypatch.setattr(NumpyTrainer, "contribution", contribution)

    @property
    def slow_began(self) -> int:
        return self.began.get(self.slow, 0)


@pytest.fixture
def gates(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gates]:
    made = Gates(monkeypatch)
    yield made
    made.open.set()


def plan(max_age: int) -> PlanManifest:
    rounds = {"count": 6, "mode": "asynchronous", "k": 3, "max_age": max_age}
    return changed_plan("readmission-logistic", rounds=rounds, encoding={"scale": 1024.0})


async def started(consortium: Consortium, max_age: int) -> PlanManifest:
    for name in HOSPITALS:
        consortium.reconfigure(name, privacy={"allow_without_privacy": True})
    made = plan(max_age)
    consortium.create_job(made)
    await consortium.start()
    return made


def advert(consortium: Consortium, hospital: str, round_number: int, attempt: int = 1) -> tuple[int, int]:
    """(version trained on, age) as the hospital last reported for a round."""
    request = consortium.told("ready", (consortium.job_id, round_number, attempt))[hospital]
    return request.base_version, parse(Advert, request.advert.statement).age


def charged(consortium: Consortium, hospital: str) -> int:
    return read_ledger(consortium.nodes[hospital].config.data_dir)[0].charged


async def round_without_the_slow_one(consortium: Consortium, number: int, base: str) -> str:
    """The slow hospital is asked as well, and trains on."""
    where: dict[str, Any] = {"round_number": number, "base_state_sha256": base}
    consortium.tell([SLOW], consortium.task(pb.TASK_KIND_TRAIN, **where))
    return await consortium.round(FAST, round_number=number, base=base)


async def test_a_late_result_goes_into_a_later_round_with_its_weight(consortium: Consortium, gates: Gates) -> None:
    made = await started(consortium, max_age=2)
    gates.open.clear()
    first = await round_without_the_slow_one(consortium, 1, "")
    await consortium.centre.until(lambda: gates.slow_began == 1, "training at the slow hospital")
    assert charged(consortium, SLOW) == 0
    second = await round_without_the_slow_one(consortium, 2, first)
    gates.open.set()
    third = await consortium.round(HOSPITALS, round_number=3, base=second)
    assert gates.slow_began == 1, "one training for three rounds"
    assert advert(consortium, SLOW, 3) == (0, 2)
    assert [advert(consortium, name, 3) for name in FAST] == [(2, 0)] * 3
    assert {name: charged(consortium, name) for name in HOSPITALS} == {"h1": 3, "h2": 3, "h3": 3, "h4": 1}
    base, after = (np.frombuffer(consortium.open_state(sha256, 3)) for sha256 in (second, third))
    told, length = made.rounds.count, made.train_length
    rows = made.weights_length
    expected = np.zeros(length, dtype=np.int64)
    for name in HOSPITALS:
        state, age = (base, 0) if name in FAST else (np.zeros(length), 2)
        trainer = NumpyTrainer(made, f"data of {name}".encode())
        values = trainer.contribution(state.tobytes(), told)[:length]
        weights = np.full(length, weight_units(age))
        weights[rows:] = made.weight_units
        expected += values * weights
    assert np.array_equal(after, base + expected / 4)


async def test_a_result_beyond_the_bound_is_thrown_away_uncharged(consortium: Consortium, gates: Gates) -> None:
    await started(consortium, max_age=1)
    gates.open.clear()
    state = await round_without_the_slow_one(consortium, 1, "")
    await consortium.centre.until(lambda: gates.slow_began == 1, "training at the slow hospital")
    state = await round_without_the_slow_one(consortium, 2, state)
    gates.open.set()
    await consortium.round(HOSPITALS, round_number=3, base=state)
    assert gates.slow_began == 2
    assert advert(consortium, SLOW, 3) == (2, 0)
    assert charged(consortium, SLOW) == 1


async def test_a_result_that_was_sent_is_never_used_for_another_version(consortium: Consortium, gates: Gates) -> None:
    """The round is burnt after everybody uploaded: who was ready for it trains again, who was not is as before."""
    await started(consortium, max_age=2)
    gates.open.clear()
    consortium.tell([SLOW], consortium.task(pb.TASK_KIND_TRAIN))
    await consortium.trained(FAST)
    await consortium.uploaded(FAST, FAST)
    burnt = consortium.task(pb.TASK_KIND_BURNT, reason="lost")
    consortium.tell(HOSPITALS, burnt)
    gates.open.set()
    await consortium.trained(HOSPITALS, round_number=2)
    assert [advert(consortium, name, 2) for name in HOSPITALS] == [(1, 0)] * 3 + [(0, 1)]
    assert sorted(gates.began.values()) == [1, 2, 2, 2]


async def test_a_result_that_was_ready_and_not_sent_goes_into_the_next_version_only(
    consortium: Consortium, gates: Gates
) -> None:
    """The group was sealed just before it was ready: what it made for that round is deleted."""
    await started(consortium, max_age=2)
    await consortium.trained()
    await consortium.uploaded(FAST, FAST)
    consortium.tell(HOSPITALS, consortium.task(pb.TASK_KIND_BURNT, reason="lost"))
    await consortium.trained([SLOW], round_number=2)
    assert advert(consortium, SLOW, 2) == (0, 1)
    assert gates.slow_began == 1
    kept = (consortium.nodes[SLOW].config.data_dir / "ciphertexts").glob(f"{consortium.job_id}.*")
    assert {path.name.split(".")[1] for path in kept} == {"2"}


async def test_after_a_crash_the_attempt_goes_on_with_the_age_that_it_said(
    consortium: Consortium, gates: Gates
) -> None:
    await started(consortium, max_age=2)
    gates.open.clear()
    first = await round_without_the_slow_one(consortium, 1, "")
    gates.open.set()
    where: dict[str, Any] = {"round_number": 2, "base_state_sha256": first}
    await consortium.trained([SLOW], **where)
    assert advert(consortium, SLOW, 2) == (0, 1)
    said = consortium.told("ready", (consortium.job_id, 2, 1))[SLOW].advert
    await consortium.restart(SLOW)
    await consortium.trained([SLOW], **where)
    assert consortium.told("ready", (consortium.job_id, 2, 1))[SLOW].advert == said
    assert gates.slow_began == 1, "what is on the disk needs no training"
    await consortium.trained([SLOW], attempt=2, **where)
    assert advert(consortium, SLOW, 2, attempt=2) == (1, 0), "its result is lost: the newest version is trained on"


async def test_a_plan_whose_groups_could_be_too_small_is_declined(consortium: Consortium) -> None:
    consortium.create_job(changed_plan(rounds={"count": 2, "mode": "asynchronous", "k": 2, "max_age": 1}))
    await consortium.start([SLOW])
    consortium.tell([SLOW], consortium.task(pb.TASK_KIND_TRAIN))
    declined = await consortium.centre.reported("decline", [SLOW])
    assert declined[SLOW].code == Code.PRIVACY_REFUSED.value
    assert FedmeshError(Code.PRIVACY_REFUSED, "").retryable is False
