"""Families that a hospital's admin installed, as packages on the import path."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common.errors import Code, FedmeshError
from services.hospital_node.config import DataConfig
from services.hospital_node.domain.policy import Policy, require_acceptable
from services.hospital_node.local import open_local_job
from services.hospital_node.training.cache import cache_key
from services.hospital_node.training.packages import check_installed, installed_families
from services.plans.manifest import PlanManifest
from tests.support.family_plans import DOCUMENTS, INSTALLED, PLANS
from tests.support.tiny_plan import PRIVATE, changed, manifest

PLAN = PLANS["weighted-private"]


def policy(*families: str) -> Policy:
    return Policy("h1", "clinic", 0.5, 1e-6, False, 100, 1000, frozenset(families))


def refused(plan: PlanManifest) -> FedmeshError:
    with pytest.raises(FedmeshError) as caught:
        check_installed(plan)
    return caught.value


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the example package on the import path, to be broken."""
    folder = tmp_path / "site"
    shutil.copytree(INSTALLED, folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "fedmesh_example_family", raising=False)
    yield folder
    sys.modules.pop("fedmesh_example_family", None)


def test_what_is_not_installed_is_refused_before_data_is_read(tmp_path: Path) -> None:
    """Also by a hospital that allows it."""
    require_acceptable(policy("weighted-logistic"), PLAN, 4)
    with pytest.raises(FedmeshError) as caught:
        open_local_job(PLAN, DataConfig(file=tmp_path / "none.parquet"), tmp_path / "cache")
    assert caught.value.code is Code.PLAN_INVALID
    assert "'weighted-logistic', which is not installed at this hospital (installed: none)" in caught.value.message
    assert "entry point" in caught.value.message


@pytest.mark.usefixtures("installed")
def test_what_is_installed_still_has_to_be_allowed() -> None:
    check_installed(PLAN)
    for families in ((), ("another",)):
        with pytest.raises(FedmeshError) as caught:
            require_acceptable(policy(*families), PLAN, 4)
        assert caught.value.code is Code.PLAN_INVALID
        assert "which this hospital does not allow" in caught.value.message
        assert f"(allowed: {', '.join(families) or 'none'})" in caught.value.message
    require_acceptable(policy("weighted-logistic"), PLAN, 4)
    require_acceptable(policy(), manifest(PRIVATE), 4)


@pytest.mark.usefixtures("installed")
def test_the_package_says_what_is_wrong_with_a_plan() -> None:
    assert installed_families() == {"weighted-logistic": "fedmesh-example-family 1.0"}
    document = DOCUMENTS["weighted-private"]
    for path, value, text in (
        ("algorithm.parameters", {"speed": 1}, "parameters are positive_weight and learning_rate, not speed"),
        ("algorithm.parameters.positive_weight", -1, "must be numbers above 0"),
        ("algorithm.length", 9, "with length = 6, not 9"),
    ):
        error = refused(manifest(changed(document, path, value)))
        assert error.code is Code.PLAN_INVALID
        assert "family 'weighted-logistic' refuses the plan" in error.message
        assert text in error.message


def test_a_broken_package_is_named(site: Path) -> None:
    module = site / "fedmesh_example_family" / "__init__.py"
    for text, expected in (
        ("import nothing_of_that_name\n", "ModuleNotFoundError"),
        ("def check(*given):\n    pass\n", "has no function vector, update"),
    ):
        module.write_text(text)
        # Compiled files are told apart by second and size: two texts of one length in one second are the same to them.
        shutil.rmtree(module.parent / "__pycache__", ignore_errors=True)
        sys.modules.pop("fedmesh_example_family", None)
        error = refused(PLAN)
        assert error.code is Code.CONFIG_INVALID
        assert "fedmesh-example-family 1.0" in error.message
        assert expected in error.message


def test_two_packages_with_one_name_are_refused(site: Path) -> None:
    folder = site / "fedmesh_other-2.0.dist-info"
    shutil.copytree(site / "fedmesh_example_family-1.0.dist-info", folder)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: fedmesh-other\nVersion: 2.0\n")
    error = refused(PLAN)
    assert error.code is Code.CONFIG_INVALID
    assert "fedmesh-example-family 1.0, fedmesh-other 2.0" in error.message


def test_a_compiled_plan_depends_on_the_package(site: Path) -> None:
    before = cache_key(PLAN)
    assert cache_key(PLAN) == before
    with (site / "fedmesh_example_family" / "__init__.py").open("a") as module:
        module.write("# changed\n")
    assert cache_key(PLAN) != before


def test_checking_needs_no_tensorflow() -> None:
    """In a process of its own: another test of this one may have loaded it."""
    program = (
        "import sys; from services.hospital_node.training.packages import load_family\n"
        "load_family('weighted-logistic'); assert 'tensorflow' not in sys.modules"
    )
    path = os.pathsep.join([str(INSTALLED), *sys.path])
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, check=True, timeout=60)
