import json

from hypothesis import given
from hypothesis import strategies as st

from services.plans.document import Strict, canonical_json


class _Leaf(Strict):
    text: str
    number: int
    fraction: float


class _Tree(Strict):
    zebra: tuple[_Leaf, ...]
    names: dict[str, _Leaf]
    absent: str | None
    flag: bool


leaves = st.builds(
    _Leaf,
    text=st.text(),
    number=st.integers(-(2**70), 2**70),
    fraction=st.floats(allow_nan=False, allow_infinity=False),
)
trees = st.builds(
    _Tree,
    zebra=st.lists(leaves, max_size=3).map(tuple),
    names=st.dictionaries(st.text(), leaves, max_size=3),
    absent=st.none() | st.text(),
    flag=st.booleans(),
)


@given(trees)
def test_canonical_json_is_json_with_sorted_keys_no_spaces_and_ascii_only(tree: _Tree) -> None:
    value = tree.model_dump(mode="json")
    expected = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    assert canonical_json(tree) == expected.encode()
    assert _Tree.model_validate_json(canonical_json(tree)) == tree
