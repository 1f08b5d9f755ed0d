"""Compile a plan with TFF into two TensorFlow graphs on disk: `python -m services.hospital_node.training.compile`.

The process imports TFF, writes the graphs of MapReduceForm's `work` and `update`, and ends; what it cost in time and
memory ends with it.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from services.common.errors import FedmeshError
from services.hospital_node.training.artifact import Artifact, Graph, write_artifact
from services.plans.manifest import PlanManifest, parse_manifest


def compile_plan(manifest: PlanManifest) -> Artifact:
    """The plan's MapReduceForm as plain graphs. Imports TFF."""
    from services.hospital_node.training.process import map_reduce_form

    form = map_reduce_form(manifest)
    # Nothing but the secure sum may leave the hospital: every other output slot of `work` must be empty.
    shape = str(form.work.type_signature.result)
    expected = f"<<>,<>,<>,<int64[{manifest.vector_length}]>>"
    if shape != expected:
        raise RuntimeError(f"the compiled plan would send {shape}, not {expected}")
    return Artifact(work=_graph(form.work), update=_graph(form.update))


def _graph(computation: Any) -> Graph:
    """The GraphDef of a TensorFlow computation with the names of its input and output tensors, flattened in order."""
    from tensorflow_federated.python.core.impl.computation.computation_impl import ConcreteComputation

    proto = ConcreteComputation.get_proto(computation)
    if proto.WhichOneof("computation") != "tensorflow" or proto.tensorflow.initialize_op:
        raise RuntimeError("the compiled plan is not one self-contained TensorFlow graph")
    graph = proto.tensorflow
    return Graph(
        graph_def=graph.graph_def.value, inputs=tuple(_tensors(graph.parameter)), outputs=tuple(_tensors(graph.result))
    )


def _tensors(binding: Any) -> list[str]:
    if binding.WhichOneof("binding") == "tensor":
        return [binding.tensor.tensor_name]
    if binding.WhichOneof("binding") == "struct":
        return [name for element in binding.struct.element for name in _tensors(element)]
    raise RuntimeError("the compiled plan has an input or output that is not a tensor")


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile a plan with TensorFlow Federated.")
    parser.add_argument("--plan", type=Path, required=True, help="the plan in canonical JSON")
    parser.add_argument("--out", type=Path, required=True, help="an empty directory for the graphs")
    arguments = parser.parse_args()
    try:
        manifest = parse_manifest(arguments.plan.read_bytes())
    except FedmeshError as error:
        print(json.dumps({"error": str(error)}), file=sys.stderr)
        return 2
    write_artifact(arguments.out, compile_plan(manifest))
    return 0


if __name__ == "__main__":
    sys.exit(main())
