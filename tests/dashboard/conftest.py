"""Fixtures: a client of the dashboard, and a browser."""

from collections.abc import AsyncIterator, Iterator

import httpx2 as httpx
import pytest
from selenium import webdriver

from asyncmq_nats.backends.base import Backend
from tests.dashboard.web import Browser, client_of, find_browser, make_app, served, start_browser


@pytest.fixture
async def client(backend: Backend) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a dashboard without a login, on this machine."""
    async with client_of(make_app(backend)) as session:
        yield session


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """A browser; one for all tests of this process."""
    if find_browser() is None:
        pytest.skip("no chromium and chromedriver: apt-get install chromium chromium-driver")
    driver = start_browser(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


@pytest.fixture
async def browser(chromium: webdriver.Chrome, nats_backend: Backend) -> AsyncIterator[Browser]:
    """A browser beside a served dashboard on a real server. It must have nothing to complain of."""
    async with served(make_app(nats_backend)) as address:
        person = Browser(chromium, address)
        await person.problems()
        yield person
        complaints = await person.problems()
        await person.do(lambda: chromium.get("about:blank"))
    assert complaints == []
