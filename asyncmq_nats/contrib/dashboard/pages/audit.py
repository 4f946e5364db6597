"""What operators did."""

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from asyncmq_nats.audit import read_audit
from asyncmq_nats.contrib.dashboard.site import site_of

__all__ = ["show"]

PAGE_SIZE: Final = 50
ACTIONS: Final = ("job.", "queue.", "schedule.", "worker.")


async def show(request: Request) -> Response:
    """Show what operators did, the newest first."""
    site = site_of(request)
    given = request.query_params
    filters = {name: given.get(name, "").strip() for name in ("queue", "who", "action")}
    page = await read_audit(
        site.backend,
        given.get("after") or None,
        limit=PAGE_SIZE,
        queue=filters["queue"] or None,
        who=filters["who"] or None,
        action=filters["action"] or None,
    )
    shown = site.queues
    context = {
        "section": "audit",
        "entries": [each for each in page.entries if shown is None or each.queue in shown],
        "cursor": page.cursor,
        "after": given.get("after"),
        "filters": filters,
        "queues": await site.list_queues(),
        "actions": ACTIONS,
    }
    return site.page(request, "audit.html", context)
