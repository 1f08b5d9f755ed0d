"""What a hospital encrypts with under each parameter set, and uploads of another set than the plan's."""

from pathlib import Path

import numpy as np
import pytest

from services.common.errors import Code, FedmeshError
from services.common.ids import new_id
from services.hospital_node.domain.sums import SumTerms
from services.hospital_node.domain.tasks import AttemptId
from services.hospital_node.secret_sum import MaskedSums, _require_form
from services.hospital_node.store.state import SqliteNodeState
from services.secure_sum.epoch import EpochKeys, make_epoch
from services.secure_sum.parameters import BFV_N4096_Q60_T44_PK_V1, DEFAULT, ParameterSet
from services.secure_sum.statements import Upload
from services.secure_sum.wire import Layout
from tests.support.secure_sum import HASH, make_keys, make_roster

KEYS = make_keys(4)
ROSTER = make_roster(KEYS)
WITHOUT, HAVING = (make_epoch(KEYS[1], ROSTER, 1, public=public)[0] for public in (False, True))


def terms(params: ParameterSet, keys: EpochKeys) -> SumTerms:
    return SumTerms(AttemptId(new_id(), 1, 1), ROSTER, keys, tuple(ROSTER.ids), Layout(params, 10, 2))


@pytest.mark.parametrize(("params", "keys"), [(DEFAULT, WITHOUT), (DEFAULT, HAVING), (BFV_N4096_Q60_T44_PK_V1, HAVING)])
def test_a_hospital_prepares_with_the_keys_of_the_epoch(tmp_path: Path, params: ParameterSet, keys: EpochKeys) -> None:
    sums, bound = MaskedSums(KEYS[0], SqliteNodeState(tmp_path).attempts), terms(params, keys)
    advert = sums.begin(bound, np.arange(10, dtype=np.int64), age=0)
    assert sums.advert(bound) == advert
    (prepared,) = (path for path in (tmp_path / "ciphertexts").iterdir())
    assert prepared.stat().st_size == bound.layout.upload_bytes + 8 * 10


def test_an_epoch_of_an_older_release_is_refused_under_a_public_key_by_its_name(tmp_path: Path) -> None:
    sums = MaskedSums(KEYS[0], SqliteNodeState(tmp_path).attempts)
    with pytest.raises(FedmeshError, match="key epoch 1 has no public key") as caught:
        sums.begin(terms(BFV_N4096_Q60_T44_PK_V1, WITHOUT), np.arange(10, dtype=np.int64), age=0)
    assert caught.value.code is Code.WRONG_STATE


def test_an_upload_of_another_set_than_the_plans_blames_the_aggregator() -> None:
    bound = terms(BFV_N4096_Q60_T44_PK_V1, HAVING)
    said = Upload(
        adverts=HASH,
        attempt=bound.attempt.ref,
        ciphertext_sha256=HASH,
        hospital_id=ROSTER.ids[1],
        lanes=2,
        parameter_set=BFV_N4096_Q60_T44_PK_V1.name,
        segments=(HASH,),
        sharers=HASH,
        vector_length=10,
    )
    _require_form({ROSTER.ids[1]: said}, bound.layout)
    for changes in ({"parameter_set": DEFAULT.name}, {"lanes": 1}, {"vector_length": 11}):
        with pytest.raises(FedmeshError, match=ROSTER.ids[1]) as caught:
            _require_form({ROSTER.ids[1]: said.model_copy(update=changes)}, bound.layout)
        assert (caught.value.code, caught.value.detail["culprit"]) == (Code.CIPHERTEXT_INVALID, "aggregator")
