"""SecAgg+ without Flower's deployment: its workflow and its mod in long-lived processes, joined by plain sockets.

Every client is a process that keeps its context; messages are Flower's own, in Flower's own serialisation, over TCP on
loopback, answered as soon as they arrive. Nothing is stored, polled or started within a round, so this is faster than
any deployment of Flower can be: what is left is the protocol.

    python -m securesum.alone REPORT CLIENTS THRESHOLD RUNS PARAMS,PARAMS,...
"""

import json
import multiprocessing
import secrets
import sys
import time
from collections.abc import Iterable
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.client.mod import make_ffn, secaggplus_mod
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as WireMessage
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from securesum.client import answer
from securesum.rounds import MeasuringGrid, Rounds

LOOPBACK = "127.0.0.1"
RUN = 1
FIRST_NODE = 1000


def _context(node: int, config: dict[str, int]) -> Context:
    return Context(run_id=RUN, node_id=node, node_config=config, state=RecordDict(), run_config={}, series_id=RUN)


def _pack(message: Message) -> bytes:
    return message_to_proto(message).SerializeToString()


def _unpack(data: bytes) -> Message:
    return message_from_proto(WireMessage.FromString(data))


def client_process(address: tuple[str, int], key: bytes, client: int) -> None:
    """One client: answers until the server closes the connection."""
    node = FIRST_NODE + client
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN, node
    context = _context(node, {"partition-id": client})
    app = make_ffn(answer, [secaggplus_mod])
    with Client(address, authkey=key) as connection:
        connection.send(node)
        while True:
            try:
                data = connection.recv_bytes()
            except EOFError:
                return
            connection.send_bytes(_pack(app(_unpack(data), context)))


class SocketGrid(Grid):
    """A grid with one open socket to each client."""

    def __init__(self, connections: dict[int, Connection]) -> None:
        self._connections = connections

    def set_run(self, run) -> None:
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *args, **kwargs):
        raise NotImplementedError

    def push_messages(self, messages):
        raise NotImplementedError

    def pull_messages(self, message_ids):
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return sorted(self._connections)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        waiting = {}
        for message in messages:
            connection = self._connections[message.metadata.dst_node_id]
            connection.send_bytes(_pack(message))
            waiting[connection] = message
        until = time.monotonic() + (timeout or 0.0)
        replies = []
        while waiting and (left := until - time.monotonic()) > 0:
            for connection in wait(list(waiting), left):
                replies.append(_unpack(connection.recv_bytes()))
                del waiting[connection]
        return replies


def main(report: str, clients: int, threshold: int, runs: int, sizes: list[int]) -> None:
    """Measure every size; one JSON line a round into `report`."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN, 1
    key = secrets.token_bytes(16)
    spawn = multiprocessing.get_context("spawn")
    with Listener((LOOPBACK, 0), backlog=clients, authkey=key) as listener, Path(report).open("a", buffering=1) as out:
        processes = [
            spawn.Process(target=client_process, args=(listener.address, key, client), daemon=True)
            for client in range(clients)
        ]
        for process in processes:
            process.start()
        accepted = [listener.accept() for _ in processes]
        connections = {connection.recv(): connection for connection in accepted}
        grid = SocketGrid(connections)
        measuring = MeasuringGrid(grid, grid.send_and_receive)
        rounds = Rounds(measuring, _context(1, {}), grid.get_node_ids(), threshold)
        for size in sizes:
            for number in range(1 + runs):
                out.write(json.dumps(rounds.measure(size, warm_up=number == 0)) + "\n")
        for connection in accepted:
            connection.close()
        for process in processes:
            process.join(10)
        out.write(json.dumps({"finished": True}) + "\n")


if __name__ == "__main__":
    main(
        sys.argv[1],
        int(sys.argv[2]),
        int(sys.argv[3]),
        int(sys.argv[4]),
        [int(size) for size in sys.argv[5].split(",")],
    )
