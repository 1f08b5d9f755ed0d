"""A budget above the default needs two people: not one twice, not strangers, not for something else."""

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.common.errors import Code, FedmeshError
from services.privacy.approval import Approval, ApproverKey, add_signature, read_approval, require_approved
from services.privacy.budget import DEFAULT_LIMIT, Limit

APPROVAL = Approval("north", "north-ward", 1.0, 1e-5)
DOUBLE = Limit(1.0, 1e-5)
ADMIN, SECOND, STRANGER = (ApproverKey(name, Ed25519PrivateKey.generate()) for name in ("admin", "second", "stranger"))
APPROVERS = {key.name: key.public for key in (ADMIN, SECOND)}


def signed(folder: Path, *keys: ApproverKey, approval: Approval = APPROVAL) -> Path:
    for key in keys:
        add_signature(folder / "approval", approval, key, read_approval)
    return folder / "approval"


def refused(path: Path | None, limit: Limit = DOUBLE, **changes: object) -> str:
    asked = {"hospital_id": "north", "population": "north-ward", "approvers": APPROVERS, **changes}
    with pytest.raises(FedmeshError) as caught:
        require_approved(limit, path=path, **asked)  # type: ignore[arg-type]
    assert caught.value.code is Code.CONFIG_INVALID
    return caught.value.message


def test_the_default_needs_nobody() -> None:
    require_approved(DEFAULT_LIMIT, "north", "north-ward", None, {})
    require_approved(Limit(0.1, 1e-6), "north", "north-ward", None, {})


def test_two_people_approve_more(tmp_path: Path) -> None:
    path = signed(tmp_path, ADMIN, SECOND)
    require_approved(Limit(1.0, 1e-5), "north", "north-ward", path, APPROVERS)
    require_approved(Limit(0.7, 1e-5), "north", "north-ward", path, APPROVERS)


def test_one_is_not_enough(tmp_path: Path) -> None:
    assert "privacy.approval" in refused(None)
    path = signed(tmp_path, ADMIN)
    assert "valid are: admin" in refused(path)
    signed(tmp_path, ADMIN, STRANGER)
    assert "valid are: admin" in refused(path)
    # One person under two names.
    again = ApproverKey("second", ADMIN.key)
    signed(tmp_path, again)
    assert "2 of privacy.approvers" in refused(path, approvers={"admin": ADMIN.public, "second": ADMIN.public})


@pytest.mark.parametrize(
    ("limit", "changes"),
    [
        (Limit(1.1, 1e-5), {}),
        (Limit(1.0, 1e-4), {}),
        (Limit(1.0, 1e-5), {"hospital_id": "south"}),
        (Limit(1.0, 1e-5), {"population": "south-ward"}),
    ],
)
def test_an_approval_of_something_else_does_not_count(tmp_path: Path, limit: Limit, changes: dict[str, object]) -> None:
    assert "something else" in refused(signed(tmp_path, ADMIN, SECOND), limit, **changes)


def test_an_altered_approval_does_not_count(tmp_path: Path) -> None:
    path = signed(tmp_path, ADMIN, SECOND)
    document = json.loads(path.read_text())
    document["approval"]["epsilon_limit"] = 2.0
    path.write_text(json.dumps(document))
    assert "no signature in it is valid" in refused(path, Limit(2.0, 1e-5))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"approval": {"type": "privacy budget"}, "signatures": {}}',
                                  '{"approval": 3, "signatures": 4}'])  # fmt: skip
def test_a_file_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "approval"
    assert "cannot read" in refused(path)
    path.write_text(text)
    assert "is no approval" in refused(path)


def test_nobody_signs_something_else_into_a_file(tmp_path: Path) -> None:
    path = signed(tmp_path, ADMIN)
    with pytest.raises(FedmeshError, match="something else"):
        add_signature(path, Approval("north", "north-ward", 5.0, 1e-5), SECOND, read_approval)


def test_keys_are_private_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key"
    ADMIN.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert ApproverKey.load(path).public == ADMIN.public
    with pytest.raises(FedmeshError, match="cannot write"):
        SECOND.save(path)
    path.chmod(0o644)
    with pytest.raises(FedmeshError):
        ApproverKey.load(path)
    (tmp_path / "other").write_text("{}")
    (tmp_path / "other").chmod(0o600)
    with pytest.raises(FedmeshError, match="no key"):
        ApproverKey.load(tmp_path / "other")
