"""Timing rounds of the workflow over whatever grid carries the messages."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from flwr.common import ConfigRecord, Context, FitIns, Message, Parameters, parameters_to_ndarrays
from flwr.compat.common import recorddict_compat as compat
from flwr.server import LegacyContext, SimpleClientManager
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.strategy import FedAvg
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from securesum.protocol import within_quantisation, workflow

STAGE_TIMEOUT_S = 150.0
_NOTHING = Parameters(tensors=[], tensor_type="numpy.ndarray")


class OneSum(FedAvg):
    """Selects every client, sends no model down, keeps the average that the workflow unmasked: no work of its own."""

    def __init__(self, size: int) -> None:
        super().__init__(initial_parameters=_NOTHING)
        self.size = size
        self.average: np.ndarray | None = None

    def configure_fit(self, server_round, parameters, client_manager):
        return [(proxy, FitIns(_NOTHING, {"size": self.size})) for proxy in client_manager.all().values()]

    def aggregate_fit(self, server_round, results, failures):
        self.average = parameters_to_ndarrays(results[0][1].parameters)[0]
        return None, {}


class MeasuringGrid(Grid):
    """Passes everything on; keeps the replies so that their size can be told after the clock has stopped."""

    def __init__(self, grid: Grid, send_and_receive: Callable[..., Iterable[Message]]) -> None:
        self._grid = grid
        self._send_and_receive = send_and_receive
        self.replies: list[Message] = []

    def set_run(self, run):
        self._grid.set_run(run)

    @property
    def run(self):
        return self._grid.run

    def create_message(self, *args, **kwargs):
        return self._grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        replies = list(self._send_and_receive(messages, timeout=timeout))
        self.replies.extend(replies)
        return replies


@dataclass
class Rounds:
    """Runs rounds with the clients `nodes`."""

    grid: MeasuringGrid
    context: Context
    nodes: list[int]
    threshold: int
    number: int = field(default=0)

    def measure(self, size: int, warm_up: bool) -> dict[str, object]:
        """One round; raises RuntimeError when it halts or ends without a client.

        Its clock starts as the workflow is called (group known, nothing sent) and stops as it returns (sum
        unmasked and dequantised). Checking the sum and counting bytes are outside.
        """
        self.grid.replies = []
        seconds, exact = self._round(size)
        if any(reply.has_error() for reply in self.grid.replies) or len(self.grid.replies) != 4 * len(self.nodes):
            raise RuntimeError("a client failed within the round")
        upload = sum(_uploaded(reply) for reply in self.grid.replies) / len(self.nodes) / size
        return {
            "params": size,
            "warm_up": warm_up,
            "round_s": round(seconds, 4),
            "upload_bytes_per_parameter": round(upload, 3),
            "exact": exact,
        }

    def _round(self, size: int) -> tuple[float, bool]:
        self.number += 1
        strategy = OneSum(size)
        manager = SimpleClientManager()
        for node in self.nodes:
            manager.register(GridClientProxy(node_id=node, grid=self.grid, run_id=self.context.run_id))
        context = LegacyContext(self.context, strategy=strategy, client_manager=manager)
        context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: self.number})
        context.state.array_records[MAIN_PARAMS_RECORD] = compat.parameters_to_arrayrecord(_NOTHING, True)
        secure_sum = workflow(len(self.nodes), self.threshold, STAGE_TIMEOUT_S)
        began = time.perf_counter()
        secure_sum(self.grid, context)
        seconds = time.perf_counter() - began
        average = strategy.average
        if average is None:
            raise RuntimeError("Flower's workflow halted before the sum was unmasked; its log says why")
        return seconds, within_quantisation(average * len(self.nodes), len(self.nodes))


def _uploaded(reply: Message) -> int:
    """Bytes of the objects that a reply consists of, as Flower stores and sends them."""
    return sum(len(part.deflate()) for part in get_all_nested_objects(reply).values())
