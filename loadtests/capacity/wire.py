"""Bytes of a round that no report has: statements, and what hospitals fetch to check a sum. Without TLS and HTTP/2."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from services.hospital_node.config import ChecksConfig
from services.secure_sum.statements import Signed
from services.secure_sum.wire import layout_of
from tests.support.secure_sum import Consortium


def beside(report: Mapping[str, Any]) -> tuple[float, float]:
    """What a hospital sends and fetches beside its upload and the sum. report: of `fedmesh bench secure-sum`."""
    sent, fetched = statements(int(report["hospitals"]))
    return float(sent), float(fetched + checked(report))


def checked(report: Mapping[str, Any]) -> float:
    """Randomly chosen segments of everybody else's upload, as many as a node checks by default."""
    layout = layout_of(report["parameter_set"], int(report["params"]), int(report["lanes"]))
    share = min(1.0, ChecksConfig().segments / layout.segments)
    return float((int(report["hospitals"]) - 1) * layout.upload_bytes * share)


@cache
def statements(cohort: int) -> tuple[int, int]:
    """Signed statements that one of so many hospitals sends and fetches, from an attempt in which all take part."""
    made = Consortium.of(cohort)
    names = list(made.keys)
    made.begin(names)
    made.share()
    made.receive(names)
    made.upload(names)
    confirmations = made.confirm()
    first, states = names[0], made.states
    (reveal,) = made.reveal([first], confirmations)
    uploads = [upload for state in states.values() if (upload := state.upload) is not None]
    own = [states[first].advert, *states[first].shares_out, uploads[0], reveal]
    of_all = [*made.adverts, *made.shares_for(first, names), *uploads]
    confirmed = sum(map(len, confirmations.values()))
    return _size(own) + len(confirmations[first]), _size(of_all) + len(made.survivors) + confirmed


def _size(statements: list[Signed]) -> int:
    return sum(len(one.statement) + len(one.signature) + len(one.hospital_id) for one in statements)
