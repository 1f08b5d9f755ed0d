"""The documents point at code and tests that exist."""

import re
from pathlib import Path

import yaml

from services.cli.centre import CentreConfig

ROOT = Path(__file__).parents[2]
_PATH = re.compile(r"`((?:services|tests|docs|plans|proto|scripts)/[\w./-]+)(?:::(\w+))?`")


def test_privacy_points_at_what_exists() -> None:
    found = _PATH.findall((ROOT / "docs" / "privacy.md").read_text())
    assert len(found) > 50
    for path, name in found:
        assert (ROOT / path).exists(), path
        if name:
            assert re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text(), re.MULTILINE), f"{path}::{name}"


def test_the_file_of_an_operator_is_one() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "operations.md").read_text(), re.DOTALL)
    (file,) = [block for block in blocks if "server_name" in block]
    named = CentreConfig.model_validate(yaml.safe_load(file))
    assert named.model_fields_set == set(CentreConfig.model_fields), "all that may stand in it is shown"
