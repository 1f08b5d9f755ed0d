"""Run by Locust's own Python: an event of Locust for every call that comes on standard input, then its tables.

A line is [method, ms, bytes, status or ""]; "" is a success.
"""

import json
import sys

import gevent
from gevent.fileobject import FileObject
from locust.env import Environment
from locust.log import setup_logging
from locust.stats import print_error_report, print_percentile_stats, print_stats, stats_history


def main() -> None:
    # Locust's tables are log lines.
    setup_logging("INFO", None)
    environment = Environment()
    history = gevent.spawn(stats_history, environment.create_local_runner())
    for line in FileObject(sys.stdin.buffer, "rb"):
        method, ms, size, failed = json.loads(line)
        environment.events.request.fire(
            request_type="gRPC",
            name=method,
            response_time=ms,
            response_length=size,
            exception=RuntimeError(failed) if failed else None,
            context={},
        )
    history.kill()
    print_stats(environment.stats, current=False)
    print_percentile_stats(environment.stats)
    print_error_report(environment.stats)


main()
