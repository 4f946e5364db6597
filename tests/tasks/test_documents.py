"""Each example of docs/tasks.md runs and prints what the page says."""

import anyio
import pytest

from tests.docs.test_docs import run_block, runnable

PRINTS = [
    [
        "task 'send' would refuse this call: on: Input should be a valid date or datetime, "
        "input is too short; if its workers know better, use options(validate=False)",
        "2030 completed False",
    ],
    ["ConnectionResetError | the server hung up | 6"],
    ["send {'from': 'web'} completed None"],
    ["ada@example.org of acme"],
    ["open", "closed"],
    ["session closed", "ada@example.org: session of customers"],
]


@pytest.mark.parametrize("number", range(len(PRINTS)))
async def test_an_example_of_the_page_prints_what_it_says(number: int) -> None:
    with anyio.fail_after(120):
        printed = await run_block(runnable("docs/tasks.md", "python")[number])
    assert printed.splitlines() == PRINTS[number]


def test_every_example_is_tested() -> None:
    assert len(runnable("docs/tasks.md", "python")) == len(PRINTS)
