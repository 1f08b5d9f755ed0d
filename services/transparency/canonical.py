"""Canonical JSON: one spelling for one value, so that whoever has the value can make the bytes that were hashed.

Rules: an object at the top; keys sorted by code point; no spaces; ASCII only, everything else as lower-case \\uXXXX
escapes; integers within 64 bits; floats finite and spelled as the shortest text that reads back as the same IEEE 754
double, in Python's `repr` form (`0.5`, `1e-06`). Hence `1`, `1.0` and `"1"` stay three different values. Reading
refuses what has no single meaning: keys that occur twice, NaN, infinities, half surrogate pairs, deep nesting.
"""

import json
from typing import Any, Final

MAX_DEPTH: Final = 32
_INT64: Final = 2**63
_ENCODER: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def canonical_json(value: dict[str, Any]) -> bytes:
    """The canonical spelling of a value.

    Raises: ValueError when the value has no canonical spelling.
    """
    _check(value, MAX_DEPTH)
    return spell(value)


def spell(value: dict[str, Any]) -> bytes:
    """As `canonical_json`, of a value that `parse_json` made, which has been checked."""
    return _ENCODER.encode(value).encode("ascii")


def parse_json(text: str | bytes, depth: int = MAX_DEPTH) -> dict[str, Any]:
    """Read a JSON object, in any spelling. depth: how many levels it may be nested.

    Raises: ValueError saying what is wrong with it.
    """
    try:
        value = _DECODER.decode(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _check(value, depth)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def parse_canonical(spelling: bytes) -> dict[str, Any]:
    """Read a JSON object that must be in canonical spelling.

    Raises: ValueError when it is not.
    """
    value = parse_json(spelling)
    if canonical_json(value) != spelling:
        raise ValueError("not in canonical form")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key occurs twice")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _check(value: Any, depth: int) -> None:
    # Most values are short ASCII text, at any depth that its container may have.
    if depth and type(value) is str and value.isascii():
        return
    if depth == 0:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError("a key is not text")
            _check(key, depth)
            _check(item, depth - 1)
    elif isinstance(value, list):
        for item in value:
            _check(item, depth - 1)
    elif isinstance(value, str):
        # Half a surrogate pair cannot be written as UTF-8.
        value.encode("utf-8")
    elif isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise ValueError("a number is not finite")
    elif isinstance(value, int) and not isinstance(value, bool):
        if not -_INT64 <= value < _INT64:
            raise ValueError("an integer does not fit 64 bits: write it as text")
    elif value is not None and not isinstance(value, bool):
        raise ValueError(f"{type(value).__name__} is not a JSON value")
