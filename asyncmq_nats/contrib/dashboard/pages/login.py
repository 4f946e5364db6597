"""Log in and out, for `SessionLogin`."""

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from asyncmq_nats.contrib.dashboard.access import SessionLogin
from asyncmq_nats.contrib.dashboard.site import link, page_of_ours, site_of, text_of

__all__ = ["log_in", "log_out", "show"]


def _login_of(request: Request) -> SessionLogin:
    login = request.app.state.login
    if not isinstance(login, SessionLogin):
        raise HTTPException(404, "This dashboard has no page to log in.")
    return login


async def show(request: Request) -> Response:
    """Show the form."""
    _login_of(request)
    return _form(request)


def _form(request: Request, problem: str = "", status: int = 200) -> Response:
    context = {"problem": problem, "next": page_of_ours(request, "next"), "now": 0.0}
    return site_of(request).page(request, "login.html", context, status)


async def log_in(request: Request) -> Response:
    """Take name and password."""
    login = _login_of(request)
    form = await request.form()
    password = form.get("password", "")
    value = await login.log_in(request, text_of(form, "name"), str(password))
    if isinstance(value, Response):
        return value
    if value is None:
        return _form(request, "Name or password is wrong.", 401)
    response = RedirectResponse(page_of_ours(request, "next"), 303)
    login.set_cookie(request, response, value)
    return response


async def log_out(request: Request) -> Response:
    """Take the cookie away."""
    login = _login_of(request)
    response = RedirectResponse(link(request, "login"), 303)
    login.set_cookie(request, response, None)
    return response
