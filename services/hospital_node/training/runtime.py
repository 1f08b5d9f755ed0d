"""Runs a compiled graph through TensorFlow's C API (tensorflow/c/c_api.h), without TensorFlow's Python package.

`import tensorflow` costs 7 s and 207 MB of private memory a process; loading its shared library costs 0.2 s and 19 MB,
the rest being read-only pages that all processes share. The C API is the documented, stable interface for language
bindings: graphs, sessions and tensors are all that executing a GraphDef needs.
"""

import ctypes
import functools
import importlib.util
import os
import weakref
from collections.abc import Mapping, Sequence
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from services.common.errors import Code, FedmeshError
from services.hospital_node.training.artifact import Graph

# TF_DataType of c_api.h, the types that compiled plans use.
_TYPES: Final[Mapping[np.dtype[Any], int]] = {np.dtype(np.float32): 1, np.dtype(np.int64): 9}
_DTYPES: Final = {number: dtype for dtype, number in _TYPES.items()}
# tensorflow.ConfigProto: intra_op_parallelism_threads (field 2) = 1, inter_op_parallelism_threads (5) = 1,
# use_per_session_threads (9) = true. Single-threaded sums have one order, so results repeat bit by bit on a machine.
_CONFIG: Final = bytes([0x10, 1, 0x28, 1, 0x48, 1])


class _Buffer(Structure):
    _fields_ = (("data", c_void_p), ("length", c_size_t), ("data_deallocator", c_void_p))


class _Output(Structure):
    _fields_ = (("operation", c_void_p), ("index", c_int))


_SIGNATURES: Final[tuple[tuple[str, Any, tuple[Any, ...]], ...]] = (
    ("TF_NewStatus", c_void_p, ()),
    ("TF_DeleteStatus", None, (c_void_p,)),
    ("TF_GetCode", c_int, (c_void_p,)),
    ("TF_Message", c_char_p, (c_void_p,)),
    ("TF_NewGraph", c_void_p, ()),
    ("TF_DeleteGraph", None, (c_void_p,)),
    ("TF_NewImportGraphDefOptions", c_void_p, ()),
    ("TF_DeleteImportGraphDefOptions", None, (c_void_p,)),
    ("TF_GraphImportGraphDef", None, (c_void_p, POINTER(_Buffer), c_void_p, c_void_p)),
    ("TF_GraphOperationByName", c_void_p, (c_void_p, c_char_p)),
    ("TF_NewSessionOptions", c_void_p, ()),
    ("TF_DeleteSessionOptions", None, (c_void_p,)),
    ("TF_SetConfig", None, (c_void_p, c_void_p, c_size_t, c_void_p)),
    ("TF_NewSession", c_void_p, (c_void_p, c_void_p, c_void_p)),
    ("TF_CloseSession", None, (c_void_p, c_void_p)),
    ("TF_DeleteSession", None, (c_void_p, c_void_p)),
    (
        "TF_SessionRun",
        None,
        (
            c_void_p,
            c_void_p,
            *(POINTER(_Output), POINTER(c_void_p), c_int),
            *(POINTER(_Output), POINTER(c_void_p), c_int),
            *(c_void_p, c_int),
            c_void_p,
            c_void_p,
        ),
    ),
    ("TF_AllocateTensor", c_void_p, (c_int, POINTER(c_int64), c_int, c_size_t)),
    ("TF_DeleteTensor", None, (c_void_p,)),
    ("TF_TensorType", c_int, (c_void_p,)),
    ("TF_TensorData", c_void_p, (c_void_p,)),
    ("TF_TensorByteSize", c_size_t, (c_void_p,)),
    ("TF_NumDims", c_int, (c_void_p,)),
    ("TF_Dim", c_int64, (c_void_p, c_int)),
)


@functools.cache
def _library() -> ctypes.CDLL:
    """TensorFlow's shared library, found beside the installed package but without importing it."""
    spec = importlib.util.find_spec("tensorflow")
    if spec is None or not spec.submodule_search_locations:
        raise FedmeshError(Code.CONFIG_INVALID, "TensorFlow is not installed: install the hospital-node extra")
    folder = Path(spec.submodule_search_locations[0])
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    ctypes.CDLL(str(folder / "libtensorflow_framework.so.2"), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(folder / "libtensorflow_cc.so.2"))
    for name, result, arguments in _SIGNATURES:
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class Tensor:
    """A tensor in TensorFlow's memory. Keep one to feed the same large array to many calls without copying it."""

    def __init__(self, array: NDArray[Any]) -> None:
        """Copy a float32 or int64 array."""
        library = _library()
        array = np.ascontiguousarray(array) if array.ndim else array
        dimensions = (c_int64 * array.ndim)(*array.shape)
        pointer = library.TF_AllocateTensor(_TYPES[array.dtype], dimensions, array.ndim, array.nbytes)
        if not pointer:
            raise MemoryError(f"TensorFlow cannot allocate {array.nbytes} bytes")
        if array.nbytes:
            ctypes.memmove(library.TF_TensorData(pointer), array.ctypes.data, array.nbytes)
        self.pointer: int = pointer
        self.dtype = array.dtype
        weakref.finalize(self, library.TF_DeleteTensor, pointer)


class GraphRunner:
    """One graph in one session. Not for use by several threads at once."""

    def __init__(self, graph: Graph) -> None:
        """Load the graph.

        Raises: FedmeshError(INTERNAL) when TensorFlow refuses it.
        """
        library = _library()
        self._graph = library.TF_NewGraph()
        self._status = library.TF_NewStatus()
        self._import(graph.graph_def)
        self._inputs = self._resolve(graph.inputs)
        self._outputs = self._resolve(graph.outputs)
        options = library.TF_NewSessionOptions()
        library.TF_SetConfig(options, _CONFIG, len(_CONFIG), self._status)
        self._session = library.TF_NewSession(self._graph, options, self._status)
        library.TF_DeleteSessionOptions(options)
        self._check()
        weakref.finalize(self, _close, self._session, self._graph, self._status)

    def __call__(self, inputs: Sequence[Tensor]) -> list[NDArray[Any]]:
        """Run with one tensor for each of the graph's inputs, in order; the outputs are copies.

        Raises: FedmeshError(INTERNAL) with TensorFlow's message.
        """
        if len(inputs) != len(self._inputs):
            raise ValueError(f"the graph has {len(self._inputs)} inputs, not {len(inputs)}")
        library = _library()
        values = (c_void_p * len(inputs))(*(tensor.pointer for tensor in inputs))
        results = (c_void_p * len(self._outputs))()
        library.TF_SessionRun(
            self._session,
            None,
            *(self._inputs, values, len(inputs)),
            *(self._outputs, results, len(self._outputs)),
            *(None, 0),
            None,
            self._status,
        )
        self._check()
        return [_take(pointer or 0) for pointer in results]

    def _import(self, graph_def: bytes) -> None:
        library = _library()
        data = ctypes.create_string_buffer(graph_def, len(graph_def))
        buffer = _Buffer(ctypes.cast(data, c_void_p), len(graph_def), None)
        options = library.TF_NewImportGraphDefOptions()
        library.TF_GraphImportGraphDef(self._graph, byref(buffer), options, self._status)
        library.TF_DeleteImportGraphDefOptions(options)
        self._check()

    def _resolve(self, names: Sequence[str]) -> Any:
        outputs = (_Output * len(names))()
        for position, name in enumerate(names):
            node, _, index = name.partition(":")
            operation = _library().TF_GraphOperationByName(self._graph, node.encode())
            if not operation:
                raise FedmeshError(Code.INTERNAL, f"the compiled plan has no tensor {name}")
            outputs[position] = _Output(operation, int(index or 0))
        return outputs

    def _check(self) -> None:
        library = _library()
        if library.TF_GetCode(self._status):
            message = library.TF_Message(self._status).decode(errors="replace")[:300]
            raise FedmeshError(Code.INTERNAL, f"TensorFlow: {message}")


def _take(pointer: int) -> NDArray[Any]:
    """Copy a result out of TensorFlow's memory and free it."""
    library = _library()
    shape = [library.TF_Dim(pointer, axis) for axis in range(library.TF_NumDims(pointer))]
    array = np.empty(shape, dtype=_DTYPES[library.TF_TensorType(pointer)])
    size = library.TF_TensorByteSize(pointer)
    if size != array.nbytes:
        raise FedmeshError(Code.INTERNAL, f"TensorFlow returned {size} bytes for {array.nbytes}")
    if size:
        ctypes.memmove(array.ctypes.data, library.TF_TensorData(pointer), size)
    library.TF_DeleteTensor(pointer)
    return array


def _close(session: int, graph: int, status: int) -> None:
    library = _library()
    library.TF_CloseSession(session, status)
    library.TF_DeleteSession(session, status)
    library.TF_DeleteGraph(graph)
    library.TF_DeleteStatus(status)
