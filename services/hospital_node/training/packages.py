"""Families that a hospital's admin installed as Python packages: entry points of the group `fedmesh.plan_families`.

A plan names such a family and carries its parameters. It never carries code: what runs is what the admin installed, and
the node's configuration (`plan_families`) must allow it by name.
"""

import hashlib
import importlib.util
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Final, Protocol

from services.common.errors import Code, FedmeshError
from services.plans.algorithms import InstalledFamily
from services.plans.manifest import PlanManifest

GROUP: Final = "fedmesh.plan_families"

Parameters = Mapping[str, float | bool | str]


class PackagedFamily(Protocol):
    """What the entry point names: a module or an object with these three functions.

    The hospital's node calls `check`, which must not import TensorFlow; the compile process calls the other two, with
    tensors. Scores, metrics and predictions are those of the plan's model, whose weights [n] lie as
    `services.plans.models.Network` says.
    """

    def check(self, parameters: Parameters, features: int, weights: int, length: int) -> None:
        """Raises: ValueError saying what is wrong with a plan's parameters, or with `length` for such a model."""
        ...

    def vector(self, x: Any, y: Any, weights: Any, parameters: Parameters) -> Any:
        """What one encounter adds to its patient's vector: float32 [length] from x [features], y (0 or 1), weights [n].

        It sees one encounter at a time; fedmesh adds up, clips, rounds and noises.
        """
        ...

    def update(self, weights: Any, velocity: Any, mean: Any, parameters: Parameters) -> tuple[Any, Any]:
        """The next (weights, velocity), float32 [n] each, from the sum divided by `expected_patients`, float32
        [length]. velocity: whatever the family keeps between rounds, zeros at the start."""
        ...


def check_installed(plan: PlanManifest) -> None:
    """Refuse a plan of an installed family that this hospital cannot train; any other plan passes.

    Raises: FedmeshError(PLAN_INVALID) when the family is not installed, or refuses the plan; FedmeshError(
        CONFIG_INVALID) when its package is broken.
    """
    algorithm = plan.algorithm
    if not isinstance(algorithm, InstalledFamily):
        return
    family = load_family(algorithm.family)
    try:
        family.check(algorithm.parameters, len(plan.feature_names), plan.weights_length, algorithm.length)
    except ValueError as error:
        raise FedmeshError(
            Code.PLAN_INVALID, f"family {algorithm.family!r} refuses the plan: {error}", field="algorithm.parameters"
        ) from error


def load_family(name: str) -> PackagedFamily:
    """Import an installed family. Raises: as `check_installed`."""
    found = _entry_point(name)
    try:
        family: PackagedFamily = found.load()
    except Exception as error:
        raise FedmeshError(
            Code.CONFIG_INVALID,
            f"family {name!r} ({origin(found)}) cannot be loaded: {type(error).__name__}: {error}",
        ) from error
    missing = [function for function in ("check", "vector", "update") if not callable(getattr(family, function, None))]
    if missing:
        raise FedmeshError(
            Code.CONFIG_INVALID, f"family {name!r} ({origin(found)}) has no function {', '.join(missing)}"
        )
    return family


def installed_families() -> dict[str, str]:
    """The installed families and where each is from, such as "acme-families 1.2"."""
    return {found.name: origin(found) for found in sorted(entry_points(group=GROUP))}


def fingerprint(name: str) -> bytes:
    """SHA-256 over an installed family's package, version and Python source: what a compiled plan depends on.

    Raises: as `check_installed`.
    """
    found = _entry_point(name)
    digest = hashlib.sha256(origin(found).encode())
    spec = importlib.util.find_spec(found.module.partition(".")[0])
    for folder in spec.submodule_search_locations or [] if spec else []:
        for path in sorted(Path(folder).rglob("*.py")):
            digest.update(path.read_bytes())
    if spec is not None and spec.origin is not None and Path(spec.origin).is_file():
        digest.update(Path(spec.origin).read_bytes())
    return digest.digest()


def origin(found: EntryPoint) -> str:
    """Package and version of an entry point."""
    return f"{found.dist.name} {found.dist.version}" if found.dist is not None else "an unknown package"


def _entry_point(name: str) -> EntryPoint:
    found = list(entry_points(group=GROUP, name=name))
    if not found:
        there = ", ".join(installed_families()) or "none"
        raise FedmeshError(
            Code.PLAN_INVALID,
            f"the plan trains by family {name!r}, which is not installed at this hospital (installed: {there}); its "
            f"admin can install a package with an entry point {name!r} in the group {GROUP}",
            field="algorithm.family",
        )
    if len(found) > 1:
        raise FedmeshError(
            Code.CONFIG_INVALID,
            f"family {name!r} is offered by several packages: {', '.join(sorted(map(origin, found)))}; keep one",
        )
    return found[0]
