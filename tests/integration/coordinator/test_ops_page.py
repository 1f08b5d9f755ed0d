"""The ops page: what it says, over real HTTP from a real coordinator, and in a real browser."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest

from services.coordinator.domain.attempt import Attempt, Decline, Phase, Reports
from services.coordinator.page import Seen, render, waits_for
from services.coordinator.ports import Observation
from services.embedded.processes import free_port
from tests.support.mesh import Mesh, running_mesh, small_plan
from tests.support.stores import RedisServer

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class Page(HTMLParser):
    """Cells of the tables, all tags and all attributes of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self._cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "tr":
            self.rows.append([])
        self._cell = self._cell or tag == "td"
        if tag == "td":
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag != "td"

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][-1] += data


def observed(phase: Phase, *, reports: Reports | None = None, declined: tuple[str, ...] = ()) -> Observation:
    attempt = Attempt("job", 2, 1, "plan", 1, "", ("a", "b", "c", "d"), phase, 0, 1, group=("a", "b", "c"))
    refusals = {name: Decline("data", "<b>no</b>") for name in declined}
    return Observation(1, attempt, reports or Reports(), refusals)


def test_it_says_what_a_round_waits_for() -> None:
    trained = Reports(ready=frozenset({"a"}))
    assert waits_for(observed(Phase.TRAINING, reports=trained)) == "b, c, d to have trained"
    assert waits_for(observed(Phase.TRAINING, reports=trained, declined=("c",))) == "b, d to have trained"
    shared = Reports(shares=frozenset({"a", "c"}))
    assert waits_for(observed(Phase.SHARE, reports=shared)) == "b to send shares"
    everyone = Reports(shares=frozenset({"a", "b", "c"}))
    assert waits_for(observed(Phase.SHARE, reports=everyone)) == "the coordinator's next step"
    assert waits_for(Observation(waiting="no key epoch yet")) == "no key epoch yet"


def test_names_are_escaped_and_nothing_is_fetched() -> None:
    hostile = "<script>alert(1)</script>\"'&"
    html = render(Seen(NOW, [(hostile, Observation(waiting=hostile))], {hostile: NOW}, hostile))
    page = Page(html)
    assert not page.tags & {"script", "b", "img", "link", "iframe", "form", "a"}
    assert page.attributes <= {"lang", "charset", "http-equiv", "content", "name", "class"}
    assert page.rows[1][0] == hostile
    assert page.rows[1][3] == hostile


async def ask(port: int, request: str) -> tuple[str, dict[str, str], str]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request.encode())
    raw = (await asyncio.wait_for(reader.read(), 20)).decode()
    writer.close()
    head, _, body = raw.partition("\r\n\r\n")
    status, *lines = head.split("\r\n")
    return status, {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}, body


def get(path: str = "/", host: str = "127.0.0.1", method: str = "GET") -> str:
    return f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n\r\n"


@pytest.fixture
async def watched(tmp_path: Path, redis_server: RedisServer) -> AsyncIterator[tuple[Mesh, int]]:
    port = free_port()
    settings = {"ops_listen": f"127.0.0.1:{port}"}
    async with running_mesh(tmp_path, redis_server, manifest=small_plan(1), coordinator=settings) as mesh:
        yield mesh, port


async def listed(port: int, what: str) -> Page:
    """The page once it says something."""
    async with asyncio.timeout(60):
        while True:
            page = Page((await ask(port, get()))[2])
            if any(what in cell for row in page.rows for cell in row):
                return page
            await asyncio.sleep(0.1)


async def test_a_coordinator_serves_it(watched: tuple[Mesh, int]) -> None:
    mesh, port = watched
    status, headers, _ = await ask(port, get())
    assert status == "HTTP/1.1 200 OK"
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert headers["content-security-policy"].startswith("default-src 'none'; style-src 'sha256-")
    assert headers["x-content-type-options"] == "nosniff"
    assert "set-cookie" not in headers
    # One of the four is not started: the round waits for it, and the page says so.
    await mesh.start_hospitals(["h01", "h02", "h03"])
    job_id = mesh.create_job()
    page = await listed(port, job_id)
    rows = {row[0]: row for row in page.rows if row}
    assert rows["h01"][1] == "connected"
    page = await listed(port, "h04")
    assert {row[0]: row for row in page.rows if row}["h04"][1] == "away"
    for request, expected in (
        (get(method="POST"), "405"),
        (get("/metrics"), "404"),
        (get(host="evil.example"), "421"),
        ("nonsense\r\n\r\n", "400"),
        (get(host="localhost:7190"), "200"),
    ):
        assert (await ask(port, request))[0].split()[1] == expected
    await mesh.ended(["h01", "h02", "h03"])


CHROMIUM = shutil.which("chromium") or "chromium"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1100,640",
]


@pytest.mark.slow
async def test_a_browser_shows_it(watched: tuple[Mesh, int], tmp_path: Path) -> None:
    """Needs Debian's chromium. The style must pass the page's own policy, or the browser logs a refusal."""
    mesh, port = watched
    await mesh.start_hospitals(["h01", "h02", "h03"])
    job_id = mesh.create_job()
    await listed(port, job_id)
    picture = tmp_path / "page.png"
    command = [CHROMIUM, *FLAGS, "--enable-logging=stderr", f"--user-data-dir={tmp_path}/profile"]
    process = await asyncio.create_subprocess_exec(
        *command, f"--screenshot={picture}", f"http://127.0.0.1:{port}/", stderr=asyncio.subprocess.PIPE
    )
    _, said = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0
    assert b"Content Security Policy" not in said
    assert picture.read_bytes().startswith(b"\x89PNG")
    await mesh.ended(["h01", "h02", "h03"])
