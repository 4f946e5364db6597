"""`doctor` and `check`: faults of the server and its queues, for a person and for monitoring."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Final

import typer

from asyncmq_nats.cli.command import AsJson, CommandFailed, Session, command
from asyncmq_nats.cli.output import plain_json
from asyncmq_nats.doctor import Check, Finding, Level, Role, Thresholds, check, examine, mend, worst

__all__ = ["register"]

MARKS: Final = {Level.OK: "ok", Level.INFO: "info", Level.WARNING: "WARN", Level.ERROR: "FAIL"}
STYLES: Final = {Level.WARNING: "yellow", Level.ERROR: "bold red", Level.OK: "green"}
NAGIOS: Final = {Level.WARNING: ("WARNING", 1), Level.ERROR: ("CRITICAL", 2)}


class Form(StrEnum):
    """How `check` prints."""

    NAGIOS = "nagios"
    JSON = "json"
    PROMETHEUS = "prometheus"
    TEXT = "text"


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    command(app, "doctor")(doctor)
    command(app, "check")(look)


async def doctor(
    session: Session,
    queues: Annotated[
        list[str] | None, typer.Argument(metavar="[QUEUE]...", help="By default all.")
    ] = None,
    fix: Annotated[bool, typer.Option("--fix", help="Mend what is safe to mend.")] = False,
    role: Annotated[
        str, typer.Option(help="What this login is for: worker, admin, reader, producer.")
    ] = "worker",
    monitor: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Monitoring port of the server: tells of sync_interval."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find faults, and say how to mend them. Exits with 1 if there is an error.

    Nothing is changed without --fix.
    """
    findings: list[Finding] = []
    async for finding in examine(
        session.backend, queues=queues or None, role=_read_role(role), monitor=monitor
    ):
        findings.append(finding)
        if not as_json:
            _print(session, finding)
    mended = await mend(findings) if fix else []
    if as_json:
        session.output.json([_plain(each, dict(_texts(mended)).get(id(each))) for each in findings])
    for finding, text in mended if not as_json else ():
        session.output.line(f"fixed {finding.subject}: {text}")
    left = [each.level for each in findings if id(each) not in dict(_texts(mended))]
    if worst(left) is Level.ERROR:
        raise typer.Exit(1)


def _read_role(word: str) -> Role:
    for role in ("worker", "admin", "reader", "producer"):
        if word == role:
            return role
    raise CommandFailed(f"there is no role {word!r}: worker, admin, reader or producer")


def _texts(mended: Sequence[tuple[Finding, str]]) -> list[tuple[int, str]]:
    return [(id(finding), text) for finding, text in mended if not text.startswith("not mended")]


def _print(session: Session, finding: Finding) -> None:
    style = STYLES.get(finding.level, "")
    session.output.line(f"{MARKS[finding.level]:<4} {finding.subject}: {finding.what}", style)
    if finding.mend:
        session.output.line(f"     → {finding.mend}")


def _plain(finding: Finding, mended: str | None) -> dict[str, object]:
    return {
        "level": finding.level,
        "check": finding.check,
        "subject": finding.subject,
        "what": finding.what,
        "mend": finding.mend,
        "fixable": finding.fix is not None,
        "fixed": mended,
    }


async def look(
    session: Session,
    queues: Annotated[
        list[str] | None, typer.Argument(metavar="[QUEUE]...", help="By default all.")
    ] = None,
    form: Annotated[
        Form, typer.Option("--format", help="nagios, json, prometheus or text.")
    ] = Form.NAGIOS,
    waiting: Annotated[
        str | None, typer.Option(metavar="WARN:CRIT", help="Jobs that wait, as in 1000:5000.")
    ] = None,
    age: Annotated[
        str | None,
        typer.Option(metavar="WARN:CRIT", help="Seconds the oldest one has waited, as in 60:300."),
    ] = None,
    failed: Annotated[
        str | None, typer.Option(metavar="WARN:CRIT", help="Failed jobs that are kept.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Workers that each queue must have.")
    ] = None,
) -> None:
    """Look at queues for monitoring: one line, and an exit code.

    0: all is well; 1: a warning; 2: critical, or the server cannot be reached. Reads no code of
    yours.
    """
    thresholds = Thresholds(
        waiting=_bounds(waiting, "--waiting"),
        age=_bounds(age, "--age"),
        failed=_bounds(failed, "--failed"),
        workers=workers,
    )
    found = await check(session.backend, queues or None, thresholds)
    session.output.raw(FORMS[form](found))
    raise typer.Exit(NAGIOS.get(found.level, ("OK", 0))[1])


def _bounds(text: str | None, option: str) -> tuple[int | None, int | None]:
    """Return the numbers of `WARN:CRIT`; either may be left out."""
    if text is None:
        return None, None
    low, colon, high = text.partition(":")
    if not colon or not all(each.isdecimal() or not each for each in (low, high)):
        raise CommandFailed(f"{option} takes WARN:CRIT, as in 1000:5000 or 1000:, not {text!r}")
    return (int(low) if low else None, int(high) if high else None)


def _nagios(found: Check) -> str:
    word = NAGIOS.get(found.level, ("OK", 0))[0]
    data = " ".join(
        f"'{queue}_{name}'={value:g}"
        for queue, figures in found.figures.items()
        for name, value in figures.items()
    )
    line = f"ASYNCMQ {word} - {found.text}"
    return f"{line} | {data}" if data else line


def _json(found: Check) -> str:
    return plain_json({"level": found.level, "text": found.text, "queues": found.figures})


def _prometheus(found: Check) -> str:
    lines = [f"asyncmq_check_status {NAGIOS.get(found.level, ('OK', 0))[1]}"]
    lines += [
        f'asyncmq_check_{name}{{queue="{queue}"}} {value:g}'
        for queue, figures in found.figures.items()
        for name, value in figures.items()
    ]
    return "\n".join(lines)


def _text(found: Check) -> str:
    return f"{found.level}: {found.text}"


FORMS: Final = {
    Form.NAGIOS: _nagios,
    Form.JSON: _json,
    Form.PROMETHEUS: _prometheus,
    Form.TEXT: _text,
}
