"""The documents point at code and tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
_PATH = re.compile(r"`((?:services|tests|docs|plans|proto|scripts)/[\w./-]+)(?:::(\w+))?`")


def test_privacy_points_at_what_exists() -> None:
    found = _PATH.findall((ROOT / "docs" / "privacy.md").read_text())
    assert len(found) > 50
    for path, name in found:
        assert (ROOT / path).exists(), path
        if name:
            assert re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text(), re.MULTILINE), f"{path}::{name}"
