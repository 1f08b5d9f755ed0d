"""The steps of `make loadtest`, run by Locust's own Python; then Locust's tables.

Arguments: the socket of the process that makes the calls, and the steps as JSON.
"""

import json
import math
import sys
from typing import Any

import gevent
from locust.env import Environment
from locust.log import setup_logging
from locust.stats import print_error_report, print_percentile_stats, print_stats, stats_history

from loadtests.load.link import Link
from loadtests.load.locustfile import USERS, IdleHospital

# Calls that are under way when a step ends are waited for; they have deadlines of their own.
_STOP_S = 120


def main() -> None:
    path, plan = sys.argv[1:]
    # Locust's tables are log lines.
    setup_logging("INFO", None)
    environment = Environment(user_classes=list(USERS), stop_timeout=_STOP_S)
    environment.link = Link(path)
    runner = environment.create_local_runner()
    history = gevent.spawn(stats_history, runner)
    for step in json.loads(plan):
        _take(runner, environment.link, step)
    history.kill()
    runner.quit()
    print_stats(environment.stats, current=False)
    print_percentile_stats(environment.stats)
    print_error_report(environment.stats)


def _take(runner: Any, link: Link, step: dict[str, Any]) -> None:
    more = step["waiting"] - runner.user_classes_count[IdleHospital.__name__]
    runner.spawn_users({IdleHospital.__name__: more})
    link.ask("settle", waiting=step["waiting"])
    if step["params"]:
        link.ask("prepare", params=step["params"], sums=step["sums"])
    link.ask("begin", step=step)
    if step["user"]:
        users = math.ceil(step["rate"])
        runner.user_classes_by_name[step["user"]].per_second = step["rate"] / users
        runner.spawn_users({step["user"]: users})
    gevent.sleep(step["seconds"])
    if step["user"]:
        runner.stop_users({step["user"]: users})
    link.ask("end")


main()
