"""Every page in a real browser: it opens without a complaint, can be read, and needs no mouse."""

from collections.abc import AsyncIterator
from typing import Final

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from starlette.routing import Route

from asyncmq_nats import current_job
from asyncmq_nats.audit import AuditEntry, record_action
from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.contrib.dashboard import SessionLogin
from asyncmq_nats.contrib.dashboard.pages import ROUTES
from asyncmq_nats.flow import FlowProducer
from asyncmq_nats.jobs import Job
from asyncmq_nats.queues import Queue
from asyncmq_nats.settings import Settings
from tests.dashboard.web import Browser, make_app, served
from tests.receiver import until
from tests.running import make_queue, only, running

NO_PAGES: Final = {
    "/queues.json", "/metrics/history", "/metrics/prometheus", "/queues/{queue}/history", "/live",
    "/events/live", "/health", "/ready", "/login",
}  # fmt: skip
"""What answers with data, and the login, which has a test of its own."""
NAMES: Final = {"queue": "mail", "job": "bad"}
QUERIES: Final = {"/find": "?text=nothing", "/queues/{queue}/schedule": "?name=often"}
MORE: Final = (
    "/queues/mail/jobs?state=failed", "/queues/mail/jobs?state=any", "/queues/mail/jobs/photo",
    "/queues/mail/jobs/later", "/queues/mail/schedule", "/queues/mail/jobs/nobody",
    "/queues/mail/failures?after=done.failed:1",
)  # fmt: skip
TAB_STOPS: Final = 60


def pages() -> list[str]:
    """Return the paths of all pages, those of later releases too."""
    found = list(MORE)
    for route in ROUTES:
        assert isinstance(route, Route)
        if "GET" in (route.methods or ()) and route.path not in NO_PAGES:
            found.append(route.path.format_map(NAMES) + QUERIES.get(route.path, ""))
    return found


async def break_down(text: str, password: str = "") -> None:
    current_job().log("looking", "WARNING")
    raise ValueError(f"no {text!r} here")


async def succeed(*_: object) -> str:
    return "done"


@pytest.fixture
def settings() -> Settings:
    return Settings(stalled_after=2.0, heartbeat_interval=0.5, shutdown_timeout=5.0)


@pytest.fixture
async def queue(nats_backend: NATSBackend) -> AsyncIterator[Queue]:
    """A queue that has something for each page, and a worker."""
    queue = make_queue(nats_backend, "mail", break_down=break_down, succeed=succeed)
    await queue.upsert_repeatable("break_down", 3600, args=["x"], name="often")
    await queue.add("break_down", ["milk"], {"password": "s"}, job_id="bad", retries=1, backoff=0.1)
    await queue.add("succeed", job_id="later", delay=3600)
    flow = [Job("succeed", job_id="photo"), Job("succeed", job_id="album", depends_on=["bad"])]
    flow += [Job("succeed", job_id="page", depends_on=["photo", "album"])]
    await FlowProducer(nats_backend).add_flow("mail", flow)
    await record_action(nats_backend, AuditEntry("ada", "queue.pause", "mail"))
    async with running(queue):
        await only(queue, completed=1, failed=1, delayed=1, **{"waiting-children": 2})
        yield queue


async def without_motion(browser: Browser) -> None:
    """Have colours change at once."""
    media = {"features": [{"name": "prefers-reduced-motion", "value": "reduce"}]}
    await browser.do(lambda: browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media))


async def test_every_page_opens_and_can_be_read(browser: Browser, queue: Queue) -> None:
    await without_motion(browser)
    for path in pages():
        await browser.open(path)
        await until(lambda: browser.run(CHARTS_ARE_THERE), bool)
        assert (path, await browser.run(MALFORMED)) == (path, [])
        for theme in ("light", "dark"):
            await browser.run("document.documentElement.dataset.theme = arguments[0]", theme)
            assert (path, theme, await browser.run(PALE)) == (path, theme, [])
        complaints = [each for each in await browser.problems() if "404" not in each]
        assert (path, complaints) == (path, [])


@pytest.mark.parametrize("width", [360, 800, 1200])
async def test_nothing_overlaps_or_is_wider_than_the_page(
    browser: Browser, queue: Queue, width: int
) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    command = "Emulation.setDeviceMetricsOverride"
    await browser.do(lambda: browser.driver.execute_cdp_cmd(command, metrics))
    try:
        for path in pages():
            await browser.open(path)
            assert (path, await browser.run(OVERLAPS)) == (path, [])
            found = await browser.run("return document.documentElement.scrollWidth")
            assert (path, found) == (path, width)
        await browser.problems()  # one page is that of a job that is not there
    finally:
        command = "Emulation.clearDeviceMetricsOverride"
        await browser.do(lambda: browser.driver.execute_cdp_cmd(command, {}))


async def test_the_login_can_be_read(browser: Browser, nats_backend: NATSBackend) -> None:
    async with served(make_app(nats_backend, login=SessionLogin({"ada": "x"}))) as address:
        person = Browser(browser.driver, address)
        await person.open("/login")
        assert await person.run(MALFORMED) == []
        assert await person.run(PALE) == []
        await person.write("input[name=name]", "ada")
        await person.write("input[name=password]", "x")
        await press(person, Keys.ENTER)
        await person.sees("ada", ".top")
        await person.do(lambda: person.driver.get("about:blank"))


@pytest.mark.parametrize(
    "path", ["/", "/queues/mail", "/queues/mail/jobs?state=failed", "/failures", "/events"]
)
async def test_the_keyboard_reaches_everything_and_shows_where_it_is(
    browser: Browser, queue: Queue, path: str
) -> None:
    await browser.open(path)
    reachable = await browser.run(REACHABLE)
    await press(browser, Keys.TAB)
    assert await browser.run("return document.activeElement.className") == "skip"
    seen = []
    for _ in range(min(TAB_STOPS, reachable)):
        assert (path, await browser.run(UNSEEN_FOCUS)) == (path, [])
        seen.append(await browser.run(FOCUSED))
        await press(browser, Keys.TAB)
    assert len(set(seen)) == len(seen)
    assert len(seen) == min(TAB_STOPS, reachable)


async def test_the_link_to_the_content_leads_past_the_menu(browser: Browser, queue: Queue) -> None:
    await browser.open("/queues")
    await press(browser, Keys.TAB)
    await press(browser, Keys.ENTER)
    await press(browser, Keys.TAB)
    assert await browser.run("return !!document.activeElement.closest('main')")


async def test_dialogs_take_the_focus_and_give_it_back(browser: Browser, queue: Queue) -> None:
    await browser.open("/queues/mail")
    focused = "return document.activeElement.innerText || document.activeElement.id"
    await browser.run("document.querySelector('.headline form button').focus()")
    assert await browser.run(focused) == "Pause"
    await press(browser, Keys.ENTER)
    await until(lambda: browser.run("return document.querySelector('#confirm').open"), bool)
    assert await browser.run(focused) == "Keep"  # what is asked for by mistake is not done
    await press(browser, Keys.ESCAPE)
    assert await browser.run(focused) == "Pause"
    assert not await queue.is_paused()
    await press(browser, "/")
    assert await browser.run(focused) == "find-text"
    await press(browser, Keys.ESCAPE)
    assert await browser.run(focused) == "Pause"


async def test_rows_are_walked_and_selected_by_keys(browser: Browser, queue: Queue) -> None:
    await browser.open("/queues/mail/jobs?state=any")
    focused = "return document.activeElement.innerText"
    await press(browser, "j")
    first = await browser.run(focused)
    await press(browser, "j")
    second = await browser.run(focused)
    assert first != second
    await press(browser, "k")
    assert await browser.run(focused) == first
    await press(browser, "x")
    await browser.sees("1 selected", "#bulk")
    await browser.run("document.body.dispatchEvent(new CustomEvent('refresh'))")
    await browser.sees("0 selected", "#bulk")
    assert await browser.run(focused) == first  # the page was brought up to date meanwhile


async def press(browser: Browser, key: str) -> None:
    await browser.do(lambda: ActionChains(browser.driver).send_keys(key).perform())


OVERLAPS: Final = """
const found = [];
for (const parent of document.querySelectorAll('.filters, .headline, .buttons, .tools, .bulk, .rows :is(td, th), .feed li, .logs li, .group-head, .cards, .pager, .crumbs')) {
  const parts = [...parent.querySelectorAll(':scope > *')].filter((e) => e.checkVisibility() && !e.matches('.only-read, br'))
    .flatMap((e) => [...e.getClientRects()].map((box) => [e, box]));
  parts.forEach(([one, a], at) => parts.slice(at + 1).forEach(([other, b]) => {
    const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left), high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (one !== other && wide > 2 && high > 4) found.push(`${one.outerHTML.slice(0, 90)} and ${other.outerHTML.slice(0, 90)}`);
  }));
  for (const [e, box] of parts) {
    if (box.right > parent.getBoundingClientRect().right + 2 && !e.closest('.chip, .flow')) found.push(`cut: ${e.outerHTML.slice(0, 90)}`);
  }
}
for (const label of document.querySelectorAll('.filters > label')) {
  const field = label.querySelector('input, select'), box = label.getBoundingClientRect();
  if (field && field.checkVisibility() && field.getBoundingClientRect().right > box.right + 2) found.push(`out of its label: ${field.outerHTML.slice(0, 90)}`);
}
return found;
"""

CHARTS_ARE_THERE: Final = (
    "return [...document.querySelectorAll('[data-chart]')].every((each) => each.dataset.state)"
)

MALFORMED: Final = """
const all = (selector) => [...document.querySelectorAll(selector)];
const named = (e) => (e.innerText || '').trim() || e.getAttribute('aria-label') || e.title ||
  e.closest('label') || (e.id && document.querySelector(`label[for="${e.id}"]`)) || e.textContent.trim();
const short = (e) => e.outerHTML.slice(0, 150);
const unnamed = all('a, button, input:not([type=hidden]), select, textarea, summary, img:not([alt]), [role=img]:not([aria-label])')
  .filter((e) => !named(e)).map(short);
const untold = all('table.rows :is(tr, th, td):not([role])').map(short);
const ids = all('[id]').map((e) => e.id);
const twice = ids.filter((id, at) => ids.indexOf(id) !== at).map((id) => 'twice: ' + id);
const headings = all('h1, h2, h3').filter((e) => e.checkVisibility());
const levels = headings.map((e) => Number(e.tagName[1]));
const jumps = levels.filter((level, at) => level > (levels[at - 1] ?? 0) + 1).map((level) => 'level ' + level);
const dangling = all('[aria-labelledby], [aria-describedby]').filter((e) =>
  !document.getElementById(e.getAttribute('aria-labelledby') || e.getAttribute('aria-describedby'))).map(short);
const cells = all('table.rows tbody td:not([data-label]):not(.pick)').map(short);
const parts = ['header', 'main', 'nav[aria-label]', 'title', 'h1', 'html[lang]'];
const missing = parts.filter((each) => !document.querySelector(each));
return [...unnamed, ...untold, ...twice, ...jumps, ...dangling, ...cells, ...missing, ...(all('h1').length === 1 ? [] : ['h1 twice'])];
"""

COLOURS: Final = """
const parse = (text) => {
  const numbers = text.match(/[-+.\\d]+(?:e[-+]?\\d+)?/g).map(Number);
  if (text.startsWith('color(')) return [...numbers.slice(0, 3).map((n) => n * 255), numbers[3] ?? 1];
  return [...numbers.slice(0, 3), numbers[3] ?? 1];
};
const over = (top, below) => [...[0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])), 1];
const behind = (e) => {
  const layers = [];
  for (let at = e; at; at = at.parentElement) {
    const style = getComputedStyle(at);
    const svg = at instanceof SVGElement && at.tagName === 'g' && at.querySelector('rect');
    const colour = parse(svg ? getComputedStyle(svg).fill : style.backgroundColor);
    layers.push(colour);
    if (colour[3] === 1) break;
  }
  return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
};
const light = (colour) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
  const c = colour[i] / 255;
  return sum + weight * (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
}, 0);
const contrast = (one, other) => {
  const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
};
"""

PALE: Final = (
    COLOURS
    + """
for (const e of document.querySelectorAll('details')) e.open = true;
const found = [];
const check = (e, colour, least, what) => {
  const ground = behind(e);
  const ratio = contrast(over(parse(colour), ground), ground);
  if (ratio < least) found.push(`${what} ${ratio.toFixed(2)}: ${e.outerHTML.slice(0, 120)}`);
};
for (const e of document.body.querySelectorAll('*')) {
  if (!e.checkVisibility({ visibilityProperty: true }) || e.closest(':disabled, .only-read, .skip, canvas')) continue;
  const style = getComputedStyle(e);
  if ([...e.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim())) {
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 600);
    check(e, e instanceof SVGElement ? style.fill : style.color, large ? 3 : 4.5, 'text');
  }
  if (e.placeholder) check(e, getComputedStyle(e, '::placeholder').color, 4.5, 'placeholder');
  if (e.matches('input:not([type=hidden]):not([type=checkbox]), select, textarea')) check(e, style.borderTopColor, 3, 'border');
}
return found;
"""
)

FOCUSED: Final = """
const path = [];
for (let e = document.activeElement; e.parentElement; e = e.parentElement) path.push([...e.parentElement.children].indexOf(e));
return path.join(' ');
"""

REACHABLE: Final = """
const focusable = 'a[href], button:not(:disabled), input:not([type=hidden]):not(:disabled), select, textarea, summary, [tabindex="0"]';
return [...document.querySelectorAll(focusable)].filter((e) => e.checkVisibility({ visibilityProperty: true })).length;
"""

UNSEEN_FOCUS: Final = (
    COLOURS
    + """
const e = document.activeElement, style = getComputedStyle(e), box = e.getBoundingClientRect();
const found = [];
if (style.outlineStyle === 'none' || parseFloat(style.outlineWidth) < 1.5) found.push('no outline');
else if (contrast(over(parse(style.outlineColor), behind(e.parentElement)), behind(e.parentElement)) < 3) found.push('pale outline');
if (box.width < 2 || box.height < 2) found.push('no size');
const top = e.closest('.top, .skip') ? 0 : document.querySelector('.top').getBoundingClientRect().bottom;
if (box.bottom < top + 2 || box.top > innerHeight) found.push(`out of sight: ${box.top} to ${box.bottom}, below ${top}`);
return found.map((each) => `${each}: ${e.outerHTML.slice(0, 150)}`);
"""
)
