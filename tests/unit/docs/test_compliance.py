"""The table of controls names files and tests that exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
NAMED = re.findall(r"`((?:services|tests|docs)/[^`]+)`", (ROOT / "docs/compliance.md").read_text())


def test_every_named_file_and_test_exists() -> None:
    assert len(NAMED) > 40
    for name in NAMED:
        path, _, test = name.partition("::")
        assert (ROOT / path).is_file(), name
        if test:
            tree = ast.parse((ROOT / path).read_text())
            functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
            assert test in functions, name
