"""The documents.

Their examples run, their links lead somewhere, and what they say of names is true.
"""

import ast
import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import anyio
import pytest
from nats.aio.client import Client

import asyncmq_nats
from asyncmq_nats import (
    InMemoryBackend,
    Job,
    NATSBackend,
    Queue,
    Settings,
    context,
    events,
    exceptions,
    flow,
    jobs,
    queues,
    tasks,
    workers,
)
from asyncmq_nats.events import Event
from asyncmq_nats.jobs import OPTIONAL_FIELDS, OUTCOME_RESERVE
from asyncmq_nats.states import State
from asyncmq_nats.store.records import TIMER_LEAD
from tests.api.test_public_api import METHODS
from tests.receiver import PATIENCE

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "asyncmq_nats"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
SERVER_APIS = ("CONSUMER", "STREAM")
SETTINGS = ROOT / "docs" / "settings.md"
DOCUMENTS = [*sorted(ROOT.glob("[A-Z]*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+) run\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^```python.*?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CALL = re.compile(r"(?<![\w$])([A-Za-z][\w.]*)\(([^()]*)\)")
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")


def runnable(document: str, language: str) -> list[str]:
    """Return the blocks of a document that are marked to be run."""
    return [body for name, body in BLOCK.findall((ROOT / document).read_text()) if name == language]


# -- complete, and without dead ends


def test_contributing_names_each_folder_of_the_tests() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("* `tests/`, ")[2].partition("\n* ")[0]
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert folders == set(re.findall(r"`(\w+)/`", text))


def test_each_benchmark_has_a_row() -> None:
    named = set(
        re.findall(r"^\| `(\w+\.py)` \|", (ROOT / "benchmarks" / "README.md").read_text(), re.M)
    )
    assert named == {path.name for path in (ROOT / "benchmarks").glob("*.py")} - {"measuring.py"}


def test_every_module_has_one_row_in_the_architecture() -> None:
    text = ARCHITECTURE.read_text().partition("## Where to find what")[2]
    named = re.findall(r"`([\w/]+\.py)`", text.partition("\n## ")[0])
    modules = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    packages = [name for name in named if name.endswith("__init__.py")]
    assert sorted(set(named) - set(packages)) == sorted(
        path.relative_to(PACKAGE).as_posix() for path in modules
    )
    assert [name for name in packages if not (PACKAGE / name).is_file()] == []
    assert [name for name, count in Counter(named).items() if count > 1] == []


def test_every_class_function_and_constant_in_the_architecture_is_there() -> None:
    named = re.findall(r"`([A-Za-z_]\w*)\.(\w+)(?:\(\))?`", ARCHITECTURE.read_text())
    named = [(owner, name) for owner, name in named if owner[0].isupper() or name.isupper()]
    assert len(named) > 10
    owners: dict[str, list[Any]] = {}
    for found in pkgutil.walk_packages(asyncmq_nats.__path__, "asyncmq_nats."):
        # Django's modules need settings first.
        if not found.name.endswith("__main__") and ".contrib.django." not in found.name:
            module = importlib.import_module(found.name)
            owners.setdefault(found.name.rpartition(".")[2], []).append(module)
            for name, value in inspect.getmembers(module, inspect.isclass):
                owners.setdefault(name, []).append(value)
    assert [
        f"{owner}.{name}"
        for owner, name in named
        if owner not in SERVER_APIS
        and not any(hasattr(each, name) for each in owners.get(owner, []))
    ] == []


def test_every_setting_has_one_row_in_the_table() -> None:
    table = SETTINGS.read_text()
    rows = "".join(re.findall(r"^\| (`ASYNCMQ_NATS_[^|]*) \|", table, re.MULTILINE))
    assert sorted(re.findall(r"`ASYNCMQ_NATS_(\w+)`", rows)) == sorted(
        name.upper() for name in Settings.model_fields
    )


def test_every_default_in_the_table_is_right() -> None:
    rows = re.findall(
        r"^\| `ASYNCMQ_NATS_(\w+)` \| `([^`]*)` \|", SETTINGS.read_text(), re.MULTILINE
    )
    assert len(rows) > 10
    for name, shown in rows:
        default = Settings.model_fields[name.lower()].default
        if isinstance(default, tuple):
            default = ",".join(default)
        assert shown == (f"{default:.10g}" if isinstance(default, float) else str(default))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in LINK.findall(document.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in [
                re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles
            ], link


# -- what the text names is there

OWNED_BY: tuple[Any, ...] = (
    *(asyncmq_nats, context, exceptions, flow, jobs, queues, tasks, workers, events.event_emitter),
    *(NATSBackend, Queue, tasks.TaskWrapper, workers.Worker, flow.FlowProducer, context.JobContext),
    asyncmq_nats.JobHandle,
)
"""The objects of the names in the text."""
OF_ASYNCMQ = {"backend.enqueue"}


def calls(document: str) -> list[tuple[str, str]]:
    """Return the calls in the text of a document, outside of its blocks: names and arguments."""
    text = re.sub(
        r"^```.*?^```$", "", (ROOT / document).read_text(), flags=re.MULTILINE | re.DOTALL
    )
    return [
        call
        for span in SPAN.findall(text)
        for call in CALL.findall(span)
        if call[0] not in OF_ASYNCMQ
    ]


def takes(function: Any, keywords: set[str]) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return keywords <= {each.name for each in parameters} or any(
        each.kind is each.VAR_KEYWORD for each in parameters
    )


@pytest.mark.parametrize("document", ["docs/calls.md", "docs/coming-from-asyncmq.md"])
def test_what_is_called_in_the_text_is_there_and_takes_its_keywords(document: str) -> None:
    assert len(calls(document)) > 10
    for name, arguments in calls(document):
        last = name.rpartition(".")[2]
        found = [getattr(owner, last) for owner in OWNED_BY if callable(getattr(owner, last, None))]
        assert any(takes(each, set(re.findall(r"(\w+)=", arguments))) for each in found), (
            f"{name}({arguments})"
        )


def test_every_name_in_the_table_of_uses_is_there() -> None:
    page = (ROOT / "docs" / "calls.md").read_text()
    table = page.partition("| to | call |\n")[2].partition("\n\n")[0]
    names = [name for name in SPAN.findall(table) if re.fullmatch(r"\w+", name)]
    assert len(names) > 20
    assert [name for name in names if not any(hasattr(owner, name) for owner in OWNED_BY)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_in_a_document_can_be_read_and_imports_what_is_there(document: Path) -> None:
    for source in PYTHON.findall(document.read_text()):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("asyncmq_nats"):
                module = importlib.import_module(str(node.module))
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_a_connection_takes_the_options_in_the_text() -> None:
    sources = PYTHON.findall(SETTINGS.read_text().partition("## Connections")[2])
    (source,) = [each for each in sources if "NATSBackend(" in each]
    made = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "NATSBackend"
    ]
    given = {str(keyword.arg) for call in made for keyword in call.keywords}
    assert len(given) > 4
    assert given <= {
        *inspect.signature(NATSBackend).parameters,
        *inspect.signature(Client.connect).parameters,
    }


def test_there_are_examples_to_run() -> None:
    assert len(runnable("README.md", "python")) == 1
    assert len(runnable("docs/protocol.md", "python")) == 2
    assert len(runnable("docs/protocol.md", "conf")) == 1


# -- coming from AsyncMQ

COMING = (ROOT / "docs" / "coming-from-asyncmq.md").read_text()
VERDICTS = {"same", "better", "different", "missing"}
OWNERS: dict[str, Any] = {
    "Queue": Queue("any", InMemoryBackend()),
    "Job": Job("any"),
    "Tasks": tasks,
    "Workers": workers,
    "Flows and dependencies": flow,
    "Events": events,
}
"""The objects of the names in the tables of that page."""


def rows(title: str) -> list[list[str]]:
    """Return the cells of each row of the table under a title."""
    section = COMING.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    ][2:]


def has(owner: Any, name: str) -> bool:
    for part in name.split("."):
        if not hasattr(owner, part):
            return False
        owner = getattr(owner, part)
    return True


@pytest.mark.parametrize("title", OWNERS)
def test_names_of_asyncmq_are_there_or_missing_as_the_table_says(title: str) -> None:
    assert rows(title)
    for names, verdict, *_ in rows(title):
        assert verdict in VERDICTS
        for name in SPAN.findall(names):
            assert has(OWNERS[title], name) == (verdict != "missing"), name


def test_every_method_of_asyncmqs_queue_is_in_the_table() -> None:
    named = {name for names, *_ in rows("Queue") for name in SPAN.findall(names)}
    assert {name for name in METHODS if not name.startswith("_")} - named == set()


def test_methods_that_only_we_have_are_named() -> None:
    names = SPAN.findall(COMING.partition("Only here: ")[2].partition("\n")[0])
    methods = {name for name in vars(Queue) if not name.startswith("_")}
    assert set(names) == methods - METHODS.keys() - {"add_linked", "runner"}


def test_functions_of_core_that_are_said_to_be_missing_are() -> None:
    text = COMING.partition("Missing are the functions of `core`: ")[2].partition(". Most have")[0]
    names = SPAN.findall(text)
    assert len(names) > 10
    modules = [
        importlib.import_module(
            ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        )
        for path in PACKAGE.rglob("*.py")
        if "django" not in path.parts  # its modules need settings first
    ]
    assert [
        name for name in names if any(name in getattr(module, "__all__", ()) for module in modules)
    ] == []


def test_every_row_of_the_imports_says_where_a_name_is_or_that_it_is_missing() -> None:
    assert len(rows("Imports")) > 10
    for _, here, verdict in rows("Imports"):
        assert verdict.partition(":")[0] in VERDICTS
        assert (here == "") == verdict.startswith("missing")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_into_the_package_leads_somewhere(document: Path) -> None:
    for path in re.findall(r"`(asyncmq_nats(?:\.\w+)+)`", document.read_text()):
        parent, _, name = path.rpartition(".")
        try:
            assert hasattr(importlib.import_module(parent), name) or importlib.util.find_spec(
                path
            ), path
        except ModuleNotFoundError:
            pytest.fail(path)


def test_settings_that_replace_those_of_asyncmq_exist() -> None:
    named = {
        name
        for document in DOCUMENTS
        for name in re.findall(r"ASYNCMQ_NATS_([A-Z]\w+)", document.read_text())
    }
    assert {name.lower() for name in named} - set(Settings.model_fields) == set()


# -- the tables of the protocol


PROTOCOL = (ROOT / "docs" / "protocol.md").read_text()


def test_every_field_of_a_job_is_in_the_protocol() -> None:
    written = (
        json.loads(Job("any").encode()).keys() | {name for name, _ in OPTIONAL_FIELDS} | {"reruns"}
    )
    table = PROTOCOL.partition("## The job\n")[2].partition("### Ids")[0]
    assert [name for name in sorted(written) if f"`{name}`" not in table] == []


def test_every_event_is_in_the_protocol() -> None:
    names = set(re.findall(r"`(job:[\w-]+)`", Event.__doc__ or ""))
    assert len(names) > 8
    assert [name for name in sorted(names) if f"`{name}`" not in PROTOCOL] == []


def test_every_event_that_the_server_does_not_tell_is_named() -> None:
    named = re.findall(r"^\| `amq\.email\.event\.(\w+)\.<id>`", PROTOCOL, re.MULTILINE)
    assert set(named) == {State.WAITING, *events.ANNOUNCED}
    (row,) = re.findall(
        r"^\| events \| .*$", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE
    )
    assert [word for word in events.ANNOUNCED if f"`{word}`" not in row] == []


def test_the_sizes_are_those_of_the_protocol() -> None:
    room = 1024 * 1024 - NATSBackend().max_body
    assert f"`max_payload` less {(room + OUTCOME_RESERVE) // 1024} KiB" in PROTOCOL
    assert f"leaves {room // 1024} KiB to the headers" in PROTOCOL


def test_the_lead_of_timers_is_the_one_of_the_protocol() -> None:
    assert f"{TIMER_LEAD} s early" in PROTOCOL
    assert f"less {TIMER_LEAD} s" in PROTOCOL


# -- the examples


async def run_block(source: str, **environment: str) -> str:
    """Run a block as a program of its own; return what it printed."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("ASYNCMQ_NATS_")}
    with anyio.fail_after(2 * PATIENCE):
        done = await anyio.run_process(
            [sys.executable, "-c", source], env=clean | environment, check=False
        )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


@pytest.mark.usefixtures("server")
async def test_the_example_of_the_readme() -> None:
    (source,) = runnable("README.md", "python")
    assert await run_block(source) == "sent to ada@example.org\n"


def test_the_package_has_none_of_the_words_that_hide_who_does_what() -> None:
    words = re.compile(r"\b(whoever|nobody|anew|came to|so many)\b", re.IGNORECASE)
    assert [
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path in PACKAGE.rglob("*.py")
        for line in path.read_text().splitlines()
        if words.search(line)
    ] == []
