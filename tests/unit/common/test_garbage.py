"""The collector of a settled process: what was there is left alone, what comes after and forms cycles is found."""

import subprocess
import sys

PROGRAM = """
import gc
from services.common.garbage import settle_collector

before = len(gc.get_objects())
settle_collector()
assert gc.get_freeze_count() > 0.9 * before, "what was there is not looked at again"
found = gc.get_stats()[0]["collected"]
for _ in range(20_000):
    cycle = []
    cycle.append(cycle)
assert gc.get_stats()[0]["collected"] > found, "cycles are collected without being asked for"
settle_collector()
"""


def test_a_settled_collector_leaves_what_was_there_alone_and_still_finds_cycles() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=60)
