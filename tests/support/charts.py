"""The charts as the real Helm renders them, and pods of them laid out on this machine."""

import sys
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parents[2] / "helm"
CENTRE: Final = ROOT / "fedmesh"
HOSPITAL: Final = ROOT / "fedmesh-hospital"
RELEASE: Final = "fedmesh"
NAMESPACE: Final = "mesh"

Object = dict[str, Any]


def values_of(*files: Path | str, **more: Any) -> dict[str, Any]:
    """Values files of a chart, later ones over earlier ones, and `more` over all of them."""
    merged: dict[str, Any] = {}
    for file in files:
        _merge(merged, yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {})
    _merge(merged, more)
    return merged


def _merge(into: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = deepcopy(value)


def render(chart: Path, values: dict[str, Any] | None = None, *, upgrade: bool = False) -> list[Object]:
    """The objects of a chart as Helm would send them. Raises what Helm raises."""
    files = _files(chart, values, upgrade)
    objects: list[Object] = []
    for name, text in files.items():
        if not name.endswith((".txt", ".tpl")):
            objects += [item for item in yaml.safe_load_all(text) if item]
    return objects


def notes(chart: Path, values: dict[str, Any]) -> str:
    """What Helm prints after the installation."""
    (text,) = [text for name, text in _files(chart, values, False).items() if name.endswith("NOTES.txt")]
    return text


def _files(chart: Path, values: dict[str, Any] | None, upgrade: bool) -> dict[str, str]:
    import helm_python

    with helm_python.Chart.load(chart) as loaded:
        files: dict[str, str] = loaded.render(
            values or {}, name=RELEASE, namespace=NAMESPACE, is_install=not upgrade, is_upgrade=upgrade
        )
    return files


def named(objects: list[Object], kind: str, name: str) -> Object:
    """The one object of a kind and name."""
    (found,) = [item for item in objects if item["kind"] == kind and item["metadata"]["name"] == name]
    return found


def pods(objects: list[Object]) -> Iterator[tuple[str, Object, Object]]:
    """Every pod that the objects make: (owner, metadata of the pod, spec of the pod)."""
    for item in objects:
        owner = f"{item['kind']}/{item['metadata']['name']}"
        if item["kind"] == "Pod":
            yield owner, item["metadata"], item["spec"]
        elif item["kind"] in ("Deployment", "StatefulSet", "Job", "DaemonSet"):
            yield owner, item["spec"]["template"]["metadata"], item["spec"]["template"]["spec"]


@dataclass
class MemorySecrets:
    """A namespace's Secrets, in memory: what `services.deployment.secrets` needs of a cluster."""

    content: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def secret(self, _namespace: str, name: str) -> dict[str, bytes] | None:
        return self.content.get(name)

    def create_secret(
        self, _namespace: str, name: str, _kind: str, _labels: Mapping[str, str], content: Mapping[str, bytes]
    ) -> bool:
        if name in self.content:
            return False
        self.content[name] = dict(content)
        return True

    def replace_secret(
        self, _namespace: str, name: str, _kind: str, _labels: Mapping[str, str], content: Mapping[str, bytes]
    ) -> None:
        self.content[name] = dict(content)


@dataclass
class PodFolder:
    """A pod's files below a folder: what is mounted at /etc/x stands in <folder>/etc/x, and files say so."""

    folder: Path
    objects: list[Object]
    secrets: Mapping[str, Mapping[str, bytes]]
    replace: Mapping[str, str] = field(default_factory=dict)

    def mount(self, spec: Object, container: Object) -> None:
        """Lay out all volumes that a container mounts."""
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        for mount in container["volumeMounts"]:
            target = self.folder / mount["mountPath"].lstrip("/")
            target.mkdir(parents=True, exist_ok=True)
            volume = volumes.get(mount["name"], {})
            if "configMap" in volume:
                content = named(self.objects, "ConfigMap", volume["configMap"]["name"])["data"]
                for name, text in content.items():
                    (target / name).write_text(self.rewrite(text), encoding="utf-8")
            elif "secret" in volume:
                for item in volume["secret"]["items"]:
                    file = target / item["path"]
                    file.write_bytes(self.secrets[volume["secret"]["secretName"]][item["key"]])
                    file.chmod(0o600)

    def rewrite(self, text: str) -> str:
        """A text with this machine's paths and addresses in place of the pod's."""
        own = {path: f"{self.folder}{path}" for path in ("/etc/fedmesh", "/var/lib/fedmesh/refusals")}
        for old, new in {**own, **self.replace}.items():
            text = text.replace(old, new)
        return text


def write_all(folder: Path) -> None:
    """Render every values file of both charts into a folder, a file for each."""
    # A hospital's names have no defaults: its other files come after the example.
    example = HOSPITAL / "values-example.yaml"
    layers = {file: [file] for file in sorted(CENTRE.glob("values*.yaml"))}
    layers |= {file: [example, file] for file in sorted(HOSPITAL.glob("values-*.yaml"))}
    for file, files in layers.items():
        objects = render(file.parent, values_of(*files))
        name = f"{file.parent.name}-{file.stem}.yaml"
        (folder / name).write_text(yaml.safe_dump_all(objects), encoding="utf-8")


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
