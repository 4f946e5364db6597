"""The code in docs/frameworks.md is that of the examples, which other tests run."""

from tests.outbox.shown import shown_nowhere

PROGRAMS = (
    "examples/fastapi_app.py",
    "examples/starlette_app.py",
    "examples/litestar_app.py",
    *(f"examples/django_shop/shop/{name}.py" for name in ("asgi", "settings", "tasks", "views")),
)


def test_what_the_page_shows_is_in_the_examples() -> None:
    assert shown_nowhere("docs/frameworks.md", *PROGRAMS) == []
