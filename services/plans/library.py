"""The plans that ship with fedmesh."""

from pathlib import Path

from services.common.errors import Code, FedmeshError
from services.plans.manifest import PlanManifest, load_manifest

_PLACES = (Path(__file__).resolve().parents[2] / "plans", Path(__file__).resolve().parent / "shipped")


def plan_names() -> list[str]:
    """Names of the shipped plans."""
    return sorted({path.stem for folder in _PLACES for path in folder.glob("*.yaml")})


def plan_path(name: str) -> Path:
    """The file of a shipped plan.

    Raises: FedmeshError(NOT_FOUND) listing the names there are.
    """
    for folder in _PLACES:
        path = folder / f"{name}.yaml"
        if path.is_file():
            return path
    raise FedmeshError(Code.NOT_FOUND, f"no shipped plan {name!r}; there are: {', '.join(plan_names())}")


def shipped_plan(name: str) -> PlanManifest:
    """Load a shipped plan. Raises: as `plan_path` and `load_manifest`."""
    return load_manifest(plan_path(name))


def plan_named(text: str) -> PlanManifest:
    """A plan by the path of its file, or by its name if it ships with fedmesh. Raises: as `load_manifest`."""
    path = Path(text)
    return shipped_plan(text) if not path.exists() and text in plan_names() else load_manifest(path)
