"""`make sbom` names exactly what uv.lock has for an image, and what it counts is in no other image by mistake."""

import json
import os
import subprocess
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
UV = os.environ.get("UV", str(REPOSITORY / ".tools" / "bin" / "uv"))
CENTRE = ("registry", "coordinator", "aggregator", "audit", "deployment")
Package = Mapping[str, Any]


@pytest.fixture(scope="module")
def bills(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sbom")
    subprocess.run([REPOSITORY / "scripts" / "make_sbom.sh", UV, folder], check=True, timeout=600)
    return {
        path.name.removeprefix("fedmesh-").removesuffix(".cdx.json"): json.loads(path.read_text())
        for path in folder.iterdir()
    }


@pytest.fixture(scope="module")
def lock() -> dict[str, Package]:
    text = (REPOSITORY / "uv.lock").read_text(encoding="utf-8")
    return {package["name"]: package for package in tomllib.loads(text)["package"]}


def needed(lock: Mapping[str, Package], extras: Iterable[str]) -> set[str]:
    """Packages of an installation with these extras; those that only some platforms need are left out."""
    found: set[str] = set()
    waiting: list[tuple[str, Iterable[str]]] = [("fedmesh", extras)]
    while waiting:
        name, extra = waiting.pop()
        edges = [*lock[name].get("dependencies", [])]
        for part in extra:
            edges += lock[name].get("optional-dependencies", {}).get(part, [])
        for edge in edges:
            if "marker" not in edge and (edge["name"] not in found or edge.get("extra")):
                found.add(edge["name"])
                waiting.append((edge["name"], edge.get("extra", [])))
    return found


def test_each_image_has_a_bill_of_all_its_locked_packages(bills: dict[str, Any], lock: dict[str, Package]) -> None:
    assert set(bills) == {*CENTRE, "hospital-node"}
    for image, bill in bills.items():
        assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
        assert bill["metadata"]["component"]["name"] == "fedmesh"
        named = {part["name"]: part for part in bill["components"]}
        extras = [image] if image == "deployment" else [image, "otlp"]
        assert needed(lock, extras) <= set(named), image
        for name, part in named.items():
            package = lock[name]
            assert part["version"] == package["version"]
            assert part["purl"] == f"pkg:pypi/{name}@{package['version']}"
            files = [*package.get("wheels", []), *([package["sdist"]] if "sdist" in package else [])]
            locked = {file["hash"].removeprefix("sha256:") for file in files}
            (reference,) = part["externalReferences"]
            assert {entry["content"] for entry in reference["hashes"]} == locked, name


def test_only_the_hospital_has_tensorflow(bills: dict[str, Any]) -> None:
    packages = {image: {part["name"] for part in bill["components"]} for image, bill in bills.items()}
    for image in CENTRE:
        assert not {name for name in packages[image] if name.startswith("tensorflow")}, image
    assert "tensorflow" in packages["hospital-node"]
