"""The server's side in the deployment: waits for all nodes, measures, appends one JSON line a round to a file."""

import json
import time
from collections.abc import Iterable
from pathlib import Path

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from securesum.rounds import MeasuringGrid, Rounds

# HttpGrid.send_and_receive looks for replies every 3 s, hard-coded; the same loop with the same public calls, quicker.
POLL_S = 0.05
NODES_TIMEOUT_S = 180.0
# How many rounds of one size may fail and be repeated. A client's process that is not up within 30 s of its task's
# start is refused (Flower's HEARTBEAT_DEFAULT_INTERVAL), which happens where cores are few and busy.
FAILURES = 3

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Flower calls this once for the run."""
    config = context.run_config
    nodes = _wait_for_nodes(grid, int(config["clients"]))
    measuring = MeasuringGrid(grid, lambda messages, timeout: _send_and_receive(grid, messages, timeout))
    rounds = Rounds(measuring, context, nodes, int(config["threshold"]))
    with Path(str(config["report"])).open("a", buffering=1) as report:
        # A round takes a minute or more: only the very first, which installs the app, is not counted.
        for place, size in enumerate(str(config["params"]).split(",")):
            failures = 0
            wanted = [True] * int(place == 0) + [False] * int(config["runs"])
            while wanted:
                try:
                    record = rounds.measure(int(size), wanted[0])
                except RuntimeError as error:
                    failures += 1
                    report.write(json.dumps({"failed": f"{error} ({size} parameters, failure {failures})"}) + "\n")
                    if failures > FAILURES:
                        raise
                    continue
                report.write(json.dumps(record) + "\n")
                wanted.pop(0)
        report.write(json.dumps({"finished": True}) + "\n")


def _wait_for_nodes(grid: Grid, clients: int) -> list[int]:
    until = time.monotonic() + NODES_TIMEOUT_S
    while len(nodes := sorted(grid.get_node_ids())) < clients:
        if time.monotonic() > until:
            raise RuntimeError(f"only {len(nodes)} of {clients} SuperNodes came up within {NODES_TIMEOUT_S:.0f} s")
        time.sleep(0.5)
    return nodes[:clients]


def _send_and_receive(grid: Grid, messages: Iterable[Message], timeout: float | None) -> list[Message]:
    until = time.monotonic() + (timeout or 0.0)
    waiting = set(grid.push_messages(messages))
    replies: list[Message] = []
    while waiting and time.monotonic() < until:
        arrived = list(grid.pull_messages(waiting))
        replies.extend(arrived)
        waiting.difference_update(reply.metadata.reply_to_message_id for reply in arrived)
        if waiting:
            time.sleep(POLL_S)
    return replies
