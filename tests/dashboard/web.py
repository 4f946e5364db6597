"""Shared parts of the dashboard's tests: requests, a served dashboard, a browser."""

import re
import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import httpx2 as httpx
import uvicorn
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from asyncmq_nats.backends.base import Backend
from asyncmq_nats.contrib.dashboard import Dashboard
from tests.receiver import until

T = TypeVar("T")
ORIGIN = "http://127.0.0.1:8000"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-quic",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--window-size=1280,900",
)  # fmt: skip
SAME_ORIGIN = {"Origin": ORIGIN}
INSPECTION = (Path(__file__).parent / "inspection.js").read_text()


@asynccontextmanager
async def client_of(
    app: Any, *, prefix: str = "", **options: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """Send requests to an application as a browser on this machine does."""
    client = options.pop("client", ("127.0.0.1", 50_000))
    transport = httpx.ASGITransport(app, client=client, root_path=prefix)
    async with httpx.AsyncClient(transport=transport, base_url=ORIGIN, **options) as session:
        yield session


def words_of(response: httpx.Response) -> str:
    """Return the text of a page without its tags."""
    return " ".join(re.sub(r"<[^>]+>", " ", response.text).split())


async def post(
    client: httpx.AsyncClient,
    path: str,
    data: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> httpx.Response:
    """Send an action as a page of the dashboard does."""
    given = SAME_ORIGIN | {"HX-Request": "true"} | dict(headers or {})
    return await client.post(path, data=data or {"": ""}, headers=given)


# -- served, for a browser


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[str]:
    """Serve an application on this machine while the block runs; yield its address."""
    config = uvicorn.Config(
        app, port=0, log_level="warning", lifespan="off", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    async with anyio.create_task_group() as group:
        group.start_soon(server._serve)
        with anyio.fail_after(60):
            while not server.started:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True


def find_browser() -> tuple[str, str] | None:
    """Return the paths of Chromium and its driver; `None` if one is missing."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    return None if chromium is None or driver is None else (chromium, driver)


def start_browser(profile: Path) -> webdriver.Chrome:
    """Start a browser with a new profile."""
    found = find_browser()
    assert found is not None
    options = webdriver.ChromeOptions()
    options.binary_location = found[0]
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=Service(found[1]))


class Browser:
    """A person at a browser: opens pages, clicks, writes, looks. Each call runs in a thread."""

    def __init__(self, driver: webdriver.Chrome, address: str) -> None:
        self.driver = driver
        self.address = address

    async def do(self, act: Callable[[], T]) -> T:
        """Do something that waits for the browser."""
        return await anyio.to_thread.run_sync(act)

    async def open(self, path: str) -> None:
        """Open a page, and wait until its script has run."""
        await self.do(lambda: self.driver.get(self.address + path))
        await until(lambda: self.run("return document.documentElement.dataset.ready"), bool)

    async def run(self, script: str, *arguments: Any) -> Any:
        """Return what a script returns."""
        return await self.do(lambda: self.driver.execute_script(script, *arguments))

    async def inspect(self, function: str) -> Any:
        """Return what a function of `inspection.js` returns for this page."""
        return await self.run(f"{INSPECTION}\nreturn {function}();")

    async def click(self, selector: str, text: str = "") -> None:
        """Click the first element that is shown, that matches, and has this text."""
        await until(lambda: self.do(lambda: self._click(selector, text)), bool)

    def _click(self, selector: str, text: str) -> bool:
        try:
            for element in self._find(selector, text):
                element.click()
                return True
        except StaleElementReferenceException:  # the page was brought up to date meanwhile
            pass
        return False

    def _find(self, selector: str, text: str) -> list[WebElement]:
        found = self.driver.find_elements(By.CSS_SELECTOR, selector)
        return [each for each in found if each.is_displayed() and text in each.text]

    async def write(self, selector: str, text: str) -> None:
        """Write into a field, in place of what it has."""

        def write() -> bool:
            for element in self._find(selector, ""):
                element.clear()
                element.send_keys(text)
                return True
            return False

        await until(lambda: self.do(write), bool)

    async def confirm(self, *, typed: str = "") -> None:
        """Answer the question with yes."""
        if typed:
            await self.write("#confirm input", typed)
        await self.click("#confirm button[value=yes]")

    async def sees(self, text: str, selector: str = "body") -> None:
        """Wait until a part of the page has a text."""
        await until(lambda: self.text(selector), lambda found: text in found)

    async def text(self, selector: str = "body") -> str:
        """Return the text of a part of the page, as it is shown."""
        script = "return document.querySelector(arguments[0])?.innerText ?? ''"
        return str(await self.run(script, selector))

    async def problems(self) -> list[str]:
        """Return what the browser complained of since the last call."""
        entries = await self.do(lambda: self.driver.get_log("browser"))
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]


def make_app(backend: Backend, **options: Any) -> Dashboard:
    """Return a dashboard that looks often."""
    return Dashboard(backend, **{"refresh": 0.5} | options)
