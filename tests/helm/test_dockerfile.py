"""What the Dockerfile copies is there, what it starts starts, and the charts use its targets."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.charts import CENTRE, HOSPITAL, pods, render, values_of

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = ("registry", "coordinator", "aggregator", "audit", "deployment", "hospital-node")


def instructions() -> Iterator[tuple[str, str]]:
    text = (REPOSITORY / "Dockerfile").read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            word, _, rest = line.strip().partition(" ")
            yield word, rest


def stages() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for word, rest in instructions():
        if word == "FROM":
            found[rest.split(" AS ")[1]] = [(word, rest)]
        elif found:
            found[list(found)[-1]].append((word, rest))
    return found


def test_what_is_copied_is_in_the_repository_and_in_the_build_context() -> None:
    let_in = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        source
        for word, rest in instructions()
        if word == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert copied == let_in
    for source in copied:
        assert (REPOSITORY / source).exists(), source


def test_every_program_has_a_target_that_runs_as_nobody_in_particular() -> None:
    made = stages()
    assert ("USER", "65532:65532") in made["runtime"]
    for name in PROGRAMS:
        assert made[name][0] == ("FROM", f"runtime AS {name}")
        assert ("COPY", f"--from=build-{name} /opt/fedmesh /opt/fedmesh") in made[name]
        assert not any(word == "USER" for word, _ in made[name])


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_entry_point_starts(name: str) -> None:
    ((_, entry),) = [item for item in stages()[name] if item[0] == "ENTRYPOINT"]
    program, *arguments = re.findall(r'"([^"]+)"', entry)
    assert program == "python"
    done = subprocess.run(
        [sys.executable, *arguments, "--help"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")


def test_packages_are_locked_and_only_the_hospital_has_tensorflow() -> None:
    for name in PROGRAMS:
        synced = [rest for word, rest in stages()[f"build-{name}"] if word == "RUN"]
        assert len(synced) == 2
        for command in synced:
            assert command.startswith("uv sync --locked --no-default-groups ")
            assert set(re.findall(r"--extra (\S+)", command)) - {"otlp"} == {name}


def test_the_charts_use_these_targets() -> None:
    images = set()
    for chart, values in ((CENTRE, {}), (HOSPITAL, values_of(HOSPITAL / "values-example.yaml"))):
        for _owner, _metadata, spec in pods(render(chart, values)):
            images |= {item["image"] for item in [*spec.get("initContainers", []), *spec["containers"]]}
    own = {image.split(":")[0].removeprefix("fedmesh-") for image in images if "/" not in image}
    assert own == set(PROGRAMS)
