"""Canonical JSON: one spelling for one value, and nothing with two meanings."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.transparency.canonical import canonical_json, parse_canonical, parse_json

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
objects = st.dictionaries(
    st.text(), st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10)
)


@given(objects)
def test_canonical_json_reads_back_and_is_its_own_canonical_form(value: dict[str, Any]) -> None:
    spelling = canonical_json(value)
    assert parse_canonical(spelling) == value
    assert canonical_json(parse_json(json.dumps(value, indent=2))) == spelling


def test_the_spelling() -> None:
    value = parse_json('{ "b": [1, 1.0, 1e-6, "\u00e9"], "a": null }')
    assert canonical_json(value) == b'{"a":null,"b":[1,1.0,1e-06,"\\u00e9"]}'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"a":1,"a":2}',
        '{"a":{"b":1,"b":1}}',
        '{"a":NaN}',
        '{"a":-Infinity}',
        '{"a":1e999}',
        '{"a":9223372036854775808}',
        '{"a":"\\ud800"}',
        '{"a":' + "9" * 5000 + "}",
        '{"a":' * 40 + "1" + "}" * 40,
        '{"a":' + "[" * 100_000,
        b'{"a":"\xff"}',
    ],
)
def test_what_has_no_single_meaning_is_refused(text: str | bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the message is for people
        parse_json(text)


@pytest.mark.parametrize(
    "spelling", [b'{"a": 1}', b'{"b":1,"a":1}', b'{"a":1.00}', '{"a":"\u00e9"}'.encode(), b'{"a":1}\n']
)
def test_other_spellings_are_not_canonical(spelling: bytes) -> None:
    with pytest.raises(ValueError, match="canonical"):
        parse_canonical(spelling)
