"""The command line as a newcomer meets it: help, mistakes, exit codes."""

import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from services.cli.entry import main
from services.cli.tokens import Token
from services.embedded.ca import create_ca
from services.plans.library import plan_path, shipped_plan
from services.plans.manifest import canonical_bytes
from services.privacy.approval import require_approved
from services.privacy.budget import Limit
from services.secure_sum.roster import MemberKeys
from services.transparency.checkpoint import Checkpoint, generate_key, load_signing_key, sign_checkpoint
from services.transparency.cosignature import attach, cosign, witness_name
from services.transparency.export import write_export
from services.transparency.merkle import leaf_hash, tree_root
from tests.support.family_plans import INSTALLED, PLANS
from tests.support.hospital import found_roster


@dataclass(frozen=True)
class Ended:
    returncode: int
    stdout: str
    stderr: str


class Terminal:
    """Runs the command in this process, in an empty folder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str) -> Ended:
        self._monkeypatch.setattr(sys, "argv", ["fedmesh", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = self._capsys.readouterr()
        return Ended(int(ended.value.code or 0), captured.out, captured.err)


@pytest.fixture
def fedmesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Terminal]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDMESH_SESSION", str(tmp_path / "session.json"))
    before = signal.getsignal(signal.SIGTERM)
    yield Terminal(monkeypatch, capsys)
    signal.signal(signal.SIGTERM, before)


def test_help_lists_the_commands(fedmesh: Terminal) -> None:
    shown = fedmesh("--help")
    assert shown.returncode == 0
    for command in (
        *("demo", "up", "down", "status", "models", "rounds", "jobs", "audit", "plan", "privacy", "migrate"),
        *("hospital", "hospitals", "members", "roster", "epochs"),
    ):
        assert command in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("models",), "run `fedmesh demo` or `fedmesh up`"),
        (("hospitals",), "run `fedmesh demo` or `fedmesh up`"),
        (("roster", "show"), "run `fedmesh demo` or `fedmesh up`"),
        (("status",), "run `fedmesh up`"),
        (("bench", "privacy-audit", "--report", "nowhere/report.json"), "no such folder"),
        (("bench", "privacy-audit", "--noise-factor", "0"), "above 0"),
        (("bench", "privacy-audit", "--confidence", "95"), "between 0 and 1"),
        (("bench", "hospital", "--report", "nowhere/report.json"), "no such folder"),
        (("bench", "training", "--plan", "nowhere"), "cannot read nowhere"),
        (("login",), "sign in where?"),
        (("login", "--issuer", "http://127.0.0.1:1"), "go together"),
        (("hospital", "recover-ledger", "--config", "x.yaml", "--all-spent"), "give both"),
        (("plan", "tradeoff", "readmission-logistic-private"), "say either --synthetic or --data DIR"),
        (("plan", "tradeoff", "readmission-logistic", "--synthetic"), "nothing to trade"),
        (("plan", "tradeoff", "nowhere.yaml", "--synthetic"), "cannot read nowhere.yaml"),
        (("plan", "tradeoff", "readmission-logistic-private", "--synthetic", "--epsilon", "0"), "numbers above 0"),
        (("plan", "tradeoff", "readmission-logistic-private", "--synthetic", "--keep", "2"), "a share above 0"),
        (("plan", "tradeoff", "readmission-logistic-private", "--synthetic", "--out", "a.svg"), "the picture is a PNG"),
        (("plan", "tradeoff", "readmission-logistic-private", "--data", "nowhere"), "there is no folder nowhere"),
        (("audit", "verify", "nowhere"), "no folder"),
        (("audit", "verify", __file__), "a receipt is checked against --key and --roster, give both"),
        (("audit", "receipt", "job", "1", "--out", "r"), "name the hospital: by --config FILE, or by --hospital"),
        (("audit", "receipt", "job", "1", "--out", "r", "--config", "nofile"), "cannot read nofile"),
        (("audit", "verify", ".", "--key", "nofile"), "cannot read the key file nofile: No such file or directory"),
        (("audit", "verify", ".", "--key", "."), "cannot read the key file .: Is a directory"),
        (("audit", "verify", ".", "--key", "/dev/null"), "/dev/null holds no public key of a log"),
        (("audit", "fsck"), "there is no stack in .fedmesh/demo"),
        (("audit", "fsck", "--config", "c.yaml"), "--config needs --key"),
        (("audit", "status"), "run `fedmesh demo` or `fedmesh up`"),
        (("audit", "evidence"), "no hospital has witnessed anything"),
        (("audit", "evidence", "--data-dir", "."), "no hospital node ever ran"),
        (("demo", "--privacy", "lots"), "such as 0.5, or none"),
        (("demo", "--privacy", "-1"), "--privacy -1: use an epsilon above 0"),
        (("demo", "--privacy", "nan"), "--privacy nan: use an epsilon above 0"),
        (("demo", "--privacy", "none", "--colluders", "0"), "no guarantee against colluders to choose"),
        (("demo", "--hospitals", "4", "--colluders", "2"), "with 4 hospitals it is against 1 at most"),
        (("demo", "--data", "nowhere"), "no folder"),
        (("demo", "--data", "[red]"), "no folder [red]"),
        (("demo", "--data", "."), "lacks the encounters: expected diabetic_data.parquet or diabetic_data.csv"),
        (("demo", "--dataset", "mnist"), "use synthetic or diabetes130"),
        (("demo", "--report", "no/such/folder/r.json"), "cannot write"),
        (("privacy", "ledger"), "no hospital has a ledger"),
        (("plan", "check", "nowhere.yaml"), "nowhere.yaml"),
        (("members", "register", "north"), "run `fedmesh demo` or `fedmesh up`"),
        (("members", "invite", "north", "--out", "t"), "run `fedmesh demo` or `fedmesh up`"),
        (("members", "invite", "North", "--out", "t"), "hospital must be 1 to 63 lower-case letters"),
        (("members", "invite", "north", "--out", "t", "--valid", "5w"), "--valid 5w: use a number and s, m, h or d"),
        (("members", "invite", "north", "--out", "no/t"), "cannot write no/t: No such file or directory"),
    ],
)
def test_a_mistake_is_explained_and_ends_with_1(fedmesh: Terminal, arguments: tuple[str, ...], expected: str) -> None:
    ended = fedmesh(*arguments)
    assert ended.returncode == 1, ended.stderr
    assert expected in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr


def test_a_hospital_is_told_what_is_wrong_before_it_enrols(tmp_path: Path, fedmesh: Terminal) -> None:
    token, ca = tmp_path / "token", tmp_path / "ca.pem"

    def enrol(registry: str = "127.0.0.1:1") -> str:
        ended = fedmesh(
            *("hospital", "enrol", "--token-file", str(token), "--ca", str(ca)),
            *("--registry", registry, "--out", str(tmp_path / "tls")),
        )
        assert ended.returncode == 1
        assert "Traceback" not in ended.stderr
        return " ".join(ended.stderr.split())

    assert "cannot read" in enrol()
    token.write_text(Token.generate("north").text)
    assert "chmod 600" in enrol()
    token.chmod(0o600)
    assert "ca.pem: No such file" in enrol()
    ca.write_text("junk")
    assert "no certificate in PEM" in enrol()
    assert not (tmp_path / "tls").exists()
    ca.write_bytes((create_ca(tmp_path / "ca", "c.local").folder / "ca.pem").read_bytes())
    assert "use HOST:PORT" in enrol("https://registry")
    token.write_text("fedmesh-enrol.north.short")
    assert "holds no token" in enrol()


def test_a_plan_with_an_unknown_field_is_named(tmp_path: Path, fedmesh: Terminal) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("format: fedmesh.plan/v1\nname: x\nepsilonn: 3\n")
    ended = fedmesh("plan", "check", str(plan))
    assert ended.returncode == 1
    assert "epsilonn" in ended.stderr


def test_shipped_plans_check(fedmesh: Terminal) -> None:
    listed = fedmesh("plan", "list")
    assert listed.returncode == 0
    for line in listed.stdout.splitlines():
        name, path = line.split(maxsplit=1)
        checked = fedmesh("plan", "check", path)
        assert checked.returncode == 0
        assert name in checked.stdout
        assert "encrypted with the group key under bfv-n4096-q60-t48-v2: 1 lane(s) of 48 bits" in checked.stdout


def test_checking_a_plan_shows_its_parameter_set_and_lanes(tmp_path: Path, fedmesh: Terminal) -> None:
    document = json.loads(canonical_bytes(shipped_plan("readmission-logistic-private")))

    def checked(expected_patients: int, **encoding: Any) -> str:
        document["algorithm"]["expected_patients"] = expected_patients
        document["encoding"] |= {"parameter_set": "bfv-n4096-q60-t44-pk-v1", **encoding}
        (tmp_path / "plan.yaml").write_text(json.dumps(document))
        ended = fedmesh("plan", "check", str(tmp_path / "plan.yaml"))
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    narrow = checked(70_000, lanes=1, scale=65536)
    assert "encrypted with a public key under bfv-n4096-q60-t44-pk-v1: 1 lane(s) of 44 bits" in narrow
    assert "clip, noise and 15 hospitals leave room for 1 lane(s)" in narrow
    assert "leave room for 2 lane(s)" in checked(100, lanes=1, scale=1000)
    # The clipped parts alone fit two lanes, with the noise they do not.
    assert "noised sums need 1 lane(s): with 2 they may overflow" in checked(100, lanes=2, scale=2500)


def test_a_guarantee_against_fewer_colluders_is_told_whole(fedmesh: Terminal) -> None:
    path = str(plan_path("readmission-logistic-private"))
    usual, stated, none = (
        " ".join(fedmesh("plan", "check", path, *more).stdout.split())
        for more in ((), ("--colluders", "4"), ("--colluders", "0"))
    )
    assert "(epsilon 0.5, delta 1e-06, f 4)" in usual
    assert "(epsilon 0.5, delta 1e-06, f 4)" in stated
    assert "refused" not in usual + stated
    assert "(epsilon 0.5, delta 1e-06, f 0)" in none
    assert "refused by every hospital whose privacy.least_colluders is not set to 0 or less" in none
    assert "more colluders than f: 1: 0.52" in none
    assert len({shown.split()[2] for shown in (usual, stated, none)}) == 3, "each is a plan of its own"


def test_checking_a_plan_says_whether_its_family_is_installed(
    fedmesh: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plan.yaml").write_bytes(canonical_bytes(PLANS["weighted-private"]))
    checked = fedmesh("plan", "check", "plan.yaml")
    assert checked.returncode == 0
    assert "logistic with 6 parameters, trained by installed" in checked.stdout
    assert "could not train it: the plan trains by family 'weighted-logistic', which is not installed" in checked.stdout
    monkeypatch.syspath_prepend(str(INSTALLED))
    checked = fedmesh("plan", "check", "plan.yaml")
    assert "family weighted-logistic is installed here: fedmesh-example-family 1.0" in checked.stdout


def test_two_people_approve_a_budget_by_hand(fedmesh: Terminal, tmp_path: Path) -> None:
    approvers = {}
    for name in ("admin", "second"):
        made = fedmesh("privacy", "keygen", name, "--out", f"{name}.key")
        assert made.returncode == 0, made.stderr
        approvers[name] = made.stdout.split()[-1]
        asked = ("--hospital", "north", "--population", "north", "--epsilon-limit", "1")
        signed = fedmesh("privacy", "approve", "approval", "--key", f"{name}.key", *asked)
        assert signed.returncode == 0, signed.stderr
    assert "signed by admin, second" in signed.stdout
    require_approved(Limit(1.0, 1e-5), "north", "north", tmp_path / "approval", approvers)
    other = ("--hospital", "north", "--population", "north", "--epsilon-limit", "2")
    refused = fedmesh("privacy", "approve", "approval", "--key", "admin.key", *other)
    assert refused.returncode == 1
    assert "approves something else" in refused.stderr


def test_a_consortium_is_founded_by_hand(fedmesh: Terminal, tmp_path: Path) -> None:
    names = ("east", "north", "south", "west")
    for name in names:
        made = fedmesh("hospital", "keygen", name, "--out", f"{name}.keys")
        assert made.returncode == 0, made.stderr
        assert (tmp_path / f"{name}.keys").stat().st_mode & 0o777 == 0o600
        (tmp_path / f"{name}.card").write_text(made.stdout)
    cards = [f"{name}.card" for name in names]
    founded = fedmesh("roster", "found", *cards, "--consortium", "consortium.local", "--out", "statement")
    assert (founded.returncode, "3 must agree, 1 may collude" in founded.stdout) == (0, True)
    for name in names[:3]:
        assert fedmesh("roster", "sign", "statement", "--keys", f"{name}.keys", "--out", f"{name}.sig").returncode == 0
    signatures = [f"{name}.sig" for name in names]
    refused = fedmesh("roster", "assemble", "statement", *signatures[:3], "--out", "roster.json")
    assert (refused.returncode, "west did not sign" in refused.stderr) == (1, True)
    fedmesh("roster", "sign", "statement", "--keys", "west.keys", "--out", "west.sig")
    assert fedmesh("roster", "assemble", "statement", *signatures, "--out", "roster.json").returncode == 0
    assert "version 1" in fedmesh("roster", "check", "roster.json").stdout
    followed = fedmesh("roster", "succeed", "statement", *cards[:3], "--out", "second")
    assert "needs the signatures of 3 of the 4 members" in followed.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("hospital", "keygen", "Big Hospital", "--out", "k"), "is no hospital name"),
        (("hospital", "keygen", "north", "--out", "no/such/folder/k"), "cannot write"),
        (("roster", "found", "nowhere", "--consortium", "c", "--out", "r"), "cannot read nowhere"),
        (("roster", "check", "nowhere"), "nowhere"),
    ],
)
def test_mistakes_with_keys_and_rosters(fedmesh: Terminal, arguments: tuple[str, ...], expected: str) -> None:
    ended = fedmesh(*arguments)
    assert (ended.returncode, expected in " ".join(ended.stderr.split())) == (1, True), ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_export_that_too_few_hospitals_witnessed_is_refused(fedmesh: Terminal, tmp_path: Path) -> None:
    members = {name: MemberKeys.generate(name) for name in ("east", "north", "south", "west")}
    found_roster(tmp_path / "roster.json", "consortium.test", list(members.values()))
    generate_key(tmp_path / "log.key", "consortium.test/audit")
    key = load_signing_key(tmp_path / "log.key")
    note = sign_checkpoint(Checkpoint(key.name, 1, tree_root([leaf_hash(b"{}")])), key)
    lines = [cosign(note, witness_name("consortium.test", name), keys.signing, 1) for name, keys in members.items()]
    for count, code in ((2, 1), (3, 0)):
        write_export(tmp_path / f"log{count}", [(0, b"{}")], attach(note, lines[:count]), key.verifier)
        ended = fedmesh("audit", "verify", f"log{count}", "--roster", "roster.json")
        assert ended.returncode == code
        said = " ".join((ended.stdout + ended.stderr).split())
        assert f"{count} of 4 hospitals cosigned it, 3 are needed" in said
