"""What the compiler leaves behind: two graphs with their tensor names, and the digests that bind them."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from services.common.errors import Code, FedmeshError

_BINDING: Final = "binding.json"


@dataclass(frozen=True)
class Graph:
    """A serialized tensorflow.GraphDef; inputs and outputs are tensor names ("node:0") in the order of the types."""

    graph_def: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Artifact:
    """A compiled plan: MapReduceForm's `work` and `update`."""

    work: Graph
    update: Graph


def write_artifact(folder: Path, artifact: Artifact) -> None:
    """Write the graphs, then the binding that names and digests them."""
    binding: dict[str, Any] = {}
    for name, graph in (("work", artifact.work), ("update", artifact.update)):
        (folder / f"{name}.pb").write_bytes(graph.graph_def)
        binding[name] = {
            "sha256": hashlib.sha256(graph.graph_def).hexdigest(),
            "inputs": graph.inputs,
            "outputs": graph.outputs,
        }
    (folder / _BINDING).write_text(json.dumps(binding, indent=1))


def read_artifact(folder: Path) -> Artifact:
    """Raises: FedmeshError(INTERNAL) when a file is missing or its digest is wrong."""
    try:
        binding = json.loads((folder / _BINDING).read_bytes())
        return Artifact(work=_read(folder, "work", binding), update=_read(folder, "update", binding))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FedmeshError(Code.INTERNAL, "the compiled plan in the cache is damaged") from error


def _read(folder: Path, name: str, binding: dict[str, Any]) -> Graph:
    graph_def = (folder / f"{name}.pb").read_bytes()
    if hashlib.sha256(graph_def).hexdigest() != binding[name]["sha256"]:
        raise ValueError(f"{name}.pb does not match its digest")
    return Graph(graph_def, tuple(binding[name]["inputs"]), tuple(binding[name]["outputs"]))
