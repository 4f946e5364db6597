"""Writes a page of the reference for each public module: none is forgotten."""

import pkgutil
from importlib import import_module
from pathlib import Path
from typing import Final

import asyncmq_nats
from asyncmq_nats import contrib

FIRST: Final = ("queues", "tasks", "workers", "flow", "context", "jobs", "schedules", "events")
"""The modules that a reader wants first, in this order; then the others by name."""
NO_PAGE: Final = frozenset({"cli", "contrib", "pytest_plugin"})
"""Programs and plugins: they have pages of their own."""
BELOW: Final = ("backends", "backends.base", "backends.inmemory", "backends.nats")
"""The modules below the top level that users import."""
INTERNAL: Final = frozenset({"backends", "runtime", "store", "transitions", "wire"})
"""Packages that are not public as such."""


def public_modules() -> list[str]:
    """Return the names of the public modules, without that of the package."""
    found = [
        module.name
        for module in pkgutil.iter_modules(asyncmq_nats.__path__)
        if not module.name.startswith("_") and module.name not in INTERNAL | NO_PAGE
    ]
    rest = sorted(set(found) - set(FIRST))
    extras = [f"contrib.{module.name}" for module in pkgutil.iter_modules(contrib.__path__)]
    return [name for name in FIRST if name in found] + rest + extras + list(BELOW)


def page_names() -> list[str]:
    """Return the names of the pages in their order."""
    return ["asyncmq_nats", *public_modules()]


def write_reference(folder: Path) -> None:
    """Write a page for each public module, and remove those of modules that are gone."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {f"{name}.rst": _page(f"asyncmq_nats.{name}") for name in public_modules()}
    pages["asyncmq_nats.rst"] = _exports()
    for path in folder.glob("*.rst"):
        if path.name not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)


def _page(module: str) -> str:
    return f"{module}\n{'=' * len(module)}\n\n.. automodule:: {module}\n   :members:\n"


def _exports() -> str:
    """Return the page of the package: where each of its names is described."""
    homes: dict[str, str] = {}
    for name in public_modules():
        for exported in getattr(import_module(f"asyncmq_nats.{name}"), "__all__", ()):
            homes.setdefault(exported, name)
    rows = "".join(
        f"* :py:obj:`~asyncmq_nats.{homes[name]}.{name}`: "
        f":doc:`asyncmq_nats.{homes[name]} <{homes[name]}>`\n"
        for name in asyncmq_nats.__all__
        if name in homes
    )
    return (
        "asyncmq_nats\n============\n\n.. automodule:: asyncmq_nats\n   :no-members:\n\n"
        f"It exports these names, which are described with their modules:\n\n{rows}"
    )
