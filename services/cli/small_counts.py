"""Counts of few people are not shown: whoever pastes a table into a mail should not tell about single patients.

The threshold is the usual one of health statistics (cell size suppression: 1 to 10 are withheld, 0 is not).
"""

import re
from collections.abc import Mapping
from typing import Final

THRESHOLD: Final = 11
SMALL: Final = f"<{THRESHOLD}"
# "1 cell cannot", "3 rows repeat", as the checks say it.
_COUNTED: Final = re.compile(
    r"(?<![\w.])(?:[1-9]|10) (patient id|diagnose|[A-Za-z]+?)s? (cannot|repeat|stand|name|belong|refer|appear)s?\b"
)


def shown(count: int, exact: bool) -> str:
    """A count as people may see it."""
    return SMALL if is_small(count) and not exact else f"{count:,}"


def is_small(count: int) -> bool:
    """Whether a count is of few people."""
    return 0 < count < THRESHOLD


def shown_part(count: int, whole: int, exact: bool) -> str:
    """A count of which the whole is shown too: what is left over is no small count either."""
    if not exact and is_small(whole - count):
        return f">{whole - THRESHOLD:,}" if whole >= THRESHOLD else SMALL
    return shown(count, exact)


def shown_parts(counts: Mapping[str, int], exact: bool) -> dict[str, str]:
    """Counts whose sum is shown too: where one is withheld, a second one is, or subtraction would tell it."""
    withheld = {name for name, count in counts.items() if is_small(count) and not exact}
    others = sorted((count, name) for name, count in counts.items() if name not in withheld and count)
    if len(withheld) == 1 and others:
        withheld.add(others[0][1])
    return {name: "withheld" if name in withheld else f"{count:,}" for name, count in counts.items()}


def shown_text(text: str, exact: bool) -> str:
    """A message whose small counts are withheld."""
    return text if exact else _COUNTED.sub(rf"{SMALL} \1s \2", text)
