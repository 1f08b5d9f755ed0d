"""The stack's folder, without any process of it."""

import os
import threading
from pathlib import Path

import pytest

from services.common.errors import Code, FedmeshError
from services.embedded.stack import Stack
from services.transparency.checkpoint import load_signing_key, parse_verifier_key


def test_a_start_that_a_full_disk_cut_short_goes_on(tmp_path: Path) -> None:
    stack = Stack(tmp_path / "stack")
    stack.audit_key.parent.mkdir(parents=True)
    staging = stack.audit_verifier.with_name(f".audit.vkey.{os.getpid()}.{threading.get_ident()}")
    staging.symlink_to("/dev/full")
    with pytest.raises(FedmeshError, match="no space left") as caught:
        stack.start(())
    assert caught.value.code is Code.STORE_FULL
    stack._make_identities()
    verifier = parse_verifier_key(stack.audit_verifier.read_text().strip())
    assert verifier == load_signing_key(stack.audit_key).verifier


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    stack = Stack(tmp_path / "file" / "stack")
    with pytest.raises(FedmeshError, match="cannot use the data folder") as caught:
        stack.precompile(b"{}")
    assert caught.value.code is Code.CONFIG_INVALID
