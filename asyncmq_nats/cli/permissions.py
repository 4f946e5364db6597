"""`permissions`: what a login must be granted on the server, from docs/protocol.md."""

import re
from pathlib import Path
from typing import Annotated, Final

import typer

from asyncmq_nats.cli.command import AsJson, CommandFailed, Session, complete_queues

__all__ = ["ROLES", "grant", "permissions_of"]

ROLES: Final = ("plain", "producer", "reader", "admin", "worker")
SYNONYMS: Final = {"viewer": "reader"}
DOCUMENT: Final = "protocol.md"
LINE: Final = re.compile(r'"([^"]+)"')


def _document() -> str:
    """Return the text of docs/protocol.md: in the package when it was installed, else beside it."""
    here = Path(__file__).parent
    for path in (here / DOCUMENT, here.parents[1] / "docs" / DOCUMENT):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise CommandFailed(f"docs/{DOCUMENT} is not there: install asyncmq-nats again")


def permissions_of(role: str, prefix: str, queue: str) -> dict[str, list[str]]:
    """Return the subjects that a role publishes and subscribes to, for one queue."""
    block = _document().partition("## Permissions")[2].partition("```conf run\n")[2]
    block = block.partition("\n```")[0].partition(f"user: {role},")[2].partition("user: ")[0]
    block = re.sub(r"#.*", "", block)
    published, _, subscribed = block.partition("subscribe:")
    return {
        "publish": [_named(each, prefix, queue) for each in LINE.findall(published)],
        "subscribe": [_named(each, prefix, queue) for each in LINE.findall(subscribed)],
    }


def _named(subject: str, prefix: str, queue: str) -> str:
    """Return a subject of the example, which is for queue `email` and prefix `amq`, for another."""
    for example, meant in (
        ("amq.email.", f"{prefix}.{queue}."),
        ("amq_email", f"{prefix}_{queue}"),
        ("amq_workers", f"{prefix}_workers"),
    ):
        subject = subject.replace(example, meant)
    return subject


def _complete_roles(incomplete: str) -> list[str]:
    return [role for role in (*ROLES, *SYNONYMS) if role.startswith(incomplete)]


async def grant(
    session: Session,
    role: Annotated[
        str,
        typer.Argument(
            metavar="ROLE",
            help=f"{', '.join(ROLES)}; viewer is reader.",
            autocompletion=_complete_roles,
        ),
    ],
    queues: Annotated[
        list[str],
        typer.Argument(metavar="QUEUE...", help="Names of queues.", autocompletion=complete_queues),
    ],
    user: Annotated[str, typer.Option("--user", help="Name of the user.")] = "",
    as_json: AsJson = False,
) -> None:
    """Print the permissions that a login needs, as the configuration of a server has them.

    Speaks to no server. docs/protocol.md says what each role does.
    """
    role = SYNONYMS.get(role, role)
    if role not in ROLES:
        raise CommandFailed(f"{role!r} is no role: use {', '.join(ROLES)}")
    prefix = session.backend.settings.prefix
    merged: dict[str, list[str]] = {"publish": [], "subscribe": []}
    for queue in queues:
        session.queue(queue)  # is its name one?
        for verb, subjects in permissions_of(role, prefix, queue).items():
            merged[verb] = list(dict.fromkeys([*merged[verb], *subjects]))
    if as_json:
        session.output.json(merged)
        return
    lines = [f"user: {user or role}", "permissions: {"]
    for verb, subjects in merged.items():
        lines += [f"  {verb}: [", *(f'    "{subject}"' for subject in subjects), "  ]"]
    session.output.raw("\n".join([*lines, "}"]))
