"""The ops page: what it says, over real HTTP from a real coordinator, and in a real browser."""

import asyncio
import os
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest

from services.coordinator.domain.attempt import Attempt, Decline, Phase, Reports
from services.coordinator.page import Budgets, Seen, render, waits_for
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


def test_a_crowd_is_cut_short() -> None:
    crowd = tuple(f"h{number:03d}" for number in range(100))
    attempt = Attempt("job", 1, 1, "plan", 0, "", crowd, Phase.TRAINING, 0, 1)
    said = waits_for(Observation(1, attempt))
    assert said.endswith("h011 and 88 more to have trained")


def test_names_are_escaped_and_nothing_is_fetched() -> None:
    hostile = "<script>alert(1)</script>\"'&"
    seen = Seen(NOW, [(hostile, Observation(waiting=hostile))], {hostile: NOW}, Budgets({hostile: 0.1}, 0.5), [hostile])
    page = Page(render(seen))
    assert not page.tags & {"script", "b", "img", "link", "iframe", "form", "a"}
    assert page.attributes <= {
        "lang", "charset", "http-equiv", "content", "name", "class", "min", "max", "low", "value", "data-of"
    }  # fmt: skip
    assert page.rows[1] == [hostile, "", "none", hostile, ""]
    assert page.rows[3][:4] == [hostile, "connected", "2026-01-02 03:04:05", " 0.1 of 0.5"]


def test_what_is_not_known_is_not_called_away() -> None:
    html = render(Seen(NOW, None, None, Budgets({"a": 0.5}, 0.5), ["jobs: the registry is away"]))
    assert Page(html).rows[1][:4] == ["a", "?", "", " 0.5 of 0.5"]
    assert "Not all is known: jobs: the registry is away" in html
    assert "No job runs" not in html
    quiet = render(Seen(NOW, [], {}, None))
    assert "No job runs" in quiet
    assert "Not all is known" not in quiet


def test_what_is_wrong_is_marked() -> None:
    late = observed(Phase.SHARE, declined=("a",))
    assert late.attempt is not None
    late = replace(late, attempt=replace(late.attempt, deadline_ms=int(NOW.timestamp() * 1000) - 1000))
    html = render(Seen(NOW, [("job", late)], {"a": NOW}, Budgets({"a": 0.05, "b": 0.4}, 0.5)))
    marked = re.findall(r'<span class="(?:text )?bad">(.*?)</span>', html)
    away = "away, a running job expects it"
    assert marked == ["ended at 03:04:04", "0.05 of 0.5", "declined: &lt;b&gt;no&lt;/b&gt;", away, away, away]
    assert "<h2>Hospitals connected: 1 of 4</h2>" in html


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


async def up(port: int) -> None:
    async with asyncio.timeout(60):
        while True:
            with suppress(OSError):
                await ask(port, get())
                return
            await asyncio.sleep(0.05)


@pytest.fixture
async def watched(tmp_path: Path, redis_server: RedisServer) -> AsyncIterator[tuple[Mesh, int]]:
    port = free_port()
    settings = {"ops_listen": f"127.0.0.1:{port}"}
    async with running_mesh(tmp_path, redis_server, manifest=small_plan(1), coordinator=settings) as mesh:
        # It comes up beside the server whose port the coordinator announces.
        await up(port)
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
    assert rows["h01"][3] == " 0.25 of 0.5"
    page = await listed(port, "h04")
    assert {row[0]: row for row in page.rows if row}["h04"][1].startswith("away")
    mesh.registry.away = True
    page = await listed(port, "?")
    assert {row[0]: row for row in page.rows if row}["h01"][1:4:2] == ["connected", "?"]
    mesh.registry.away = False
    for request, expected in (
        (get(method="POST"), "405"),
        (get("/metrics"), "404"),
        (get(host="evil.example"), "421"),
        ("nonsense\r\n\r\n", "400"),
        (get(host="localhost:7190"), "200"),
    ):
        assert (await ask(port, request))[0].split()[1] == expected
    await mesh.ended(["h01", "h02", "h03"])


CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
]
WIDE = "--window-size=1100,640"
LOOKS = {
    "": [WIDE],
    "-dark": [WIDE, "--blink-settings=preferredColorScheme=0"],
    "-narrow": ["--window-size=500,900"],
}


async def chromium(profile: Path, *arguments: str) -> tuple[bytes, bytes]:
    """What a browser with a fresh profile printed and what it logged."""
    assert CHROMIUM is not None
    process = await asyncio.create_subprocess_exec(
        CHROMIUM,
        *FLAGS,
        f"--user-data-dir={profile}",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    said = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0, said[1].decode()
    return said


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: make ops-page brings it")
async def test_a_browser_shows_it(watched: tuple[Mesh, int], tmp_path: Path) -> None:
    """What a browser makes of the page, and that the page's own policy lets its style through.

    `make ops-page` keeps the pictures for people to look at: OPS_PAGE_PICTURE, and the same with `-dark` and `-narrow`.
    """
    mesh, port = watched
    seen = asyncio.Event()

    async def wait(_task: object) -> None:
        await seen.wait()

    # One is away, one takes its time, one has little budget left.
    mesh.hospitals["h03"].before = wait
    mesh.registry.epsilon_left["h02"] = 0.05
    await mesh.start_hospitals(["h01", "h02", "h03"])
    job_id = mesh.create_job()
    await listed(port, job_id)
    url = f"http://127.0.0.1:{port}/"
    shown, logged = await chromium(tmp_path / "one", "--dump-dom", url)
    page = Page(shown.decode())
    rows = {row[0]: row for row in page.rows if row}
    assert rows["h04"][1].startswith("away")
    assert rows["h02"][3] == " 0.05 of 0.5"
    assert b"Content Security Policy" not in logged
    told = Path(os.environ.get("OPS_PAGE_PICTURE") or tmp_path / "page.png")
    for name, look in LOOKS.items():
        picture = told.with_stem(told.stem + name)
        await chromium(tmp_path / f"profile{name}", *look, f"--screenshot={picture}", url)
        assert await asyncio.to_thread(picture.read_bytes)
    seen.set()
    await mesh.ended(["h01", "h02", "h03"])
