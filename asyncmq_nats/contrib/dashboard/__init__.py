"""The dashboard: pages about queues, jobs and workers, as an ASGI application.

Needs the extra `dashboard`. It reads and acts by the public API only, and stores nothing of its
own.
"""

try:
    import itsdangerous as _itsdangerous  # noqa: F401
    import jinja2 as _jinja2  # noqa: F401
    import sse_starlette as _sse_starlette  # noqa: F401
    import starlette as _starlette  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"the dashboard needs {error.name}: pip install 'asyncmq-nats[dashboard]'", name=error.name
    ) from None

from asyncmq_nats.contrib.dashboard.access import (
    Account,
    BasicLogin,
    HookLogin,
    Login,
    Role,
    SessionLogin,
    User,
    hash_password,
    read_accounts,
)
from asyncmq_nats.contrib.dashboard.app import Dashboard
from asyncmq_nats.contrib.dashboard.redaction import SECRET_KEYS, Shown

__all__ = [
    "SECRET_KEYS",
    "Account",
    "BasicLogin",
    "Dashboard",
    "HookLogin",
    "Login",
    "Role",
    "SessionLogin",
    "Shown",
    "User",
    "hash_password",
    "read_accounts",
]
