import pytest

from services.common.errors import Code, FedmeshError
from services.secure_sum.member import MemberState
from tests.support.secure_sum import HASH, Consortium


def test_a_state_reads_back(revealed: Consortium) -> None:
    member, name = revealed.member("hospital-01"), "hospital-01"
    state = member.agree(revealed.states[name], HASH, bytes(32), HASH)
    assert MemberState.from_json(state.to_json()) == state


def test_damage_is_noticed(revealed: Consortium) -> None:
    data = revealed.states["hospital-01"].to_json()
    other = data.replace(b'"version":1', b'"version":2')
    for bad in (b"", b"{}", b"[]", data[:-1], other, b"null", b"\xff"):
        with pytest.raises(FedmeshError) as caught:
            MemberState.from_json(bad)
        assert caught.value.code is Code.DATA_INVALID
