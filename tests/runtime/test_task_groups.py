"""A task group of this package raises one error: callers catch errors, not groups."""

from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

import asyncmq_nats
from asyncmq_nats._concurrency import deadline, open_task_group, unwrap_single_error
from asyncmq_nats.exceptions import AssetMissing, BackendError, Unconfirmed, WriteRefused


async def fail(error: BaseException) -> None:
    await anyio.lowlevel.checkpoint()
    raise error


@pytest.mark.parametrize(
    ("errors", "raised"),
    [
        ([WriteRefused("a", "x")], 0),
        ([WriteRefused("a", "x"), AssetMissing("b")], 0),
        ([WriteRefused("a", "x"), ValueError("a fault")], 1),
        ([BackendError("a")] * 9, 0),
    ],
)
async def test_a_group_raises_one_error(errors: list[BaseException], raised: int) -> None:
    async def run() -> None:
        async with open_task_group() as group:
            for error in errors:
                group.start_soon(fail, error)

    with pytest.raises(type(errors[raised])) as caught:
        await run()
    assert caught.value is errors[raised]


def test_an_error_in_groups_within_groups_is_raised() -> None:
    error = BackendError("a")
    with pytest.raises(BackendError) as caught, unwrap_single_error():
        raise ExceptionGroup("outer", [ExceptionGroup("inner", [error]), WriteRefused("b", "x")])
    assert caught.value is error


def test_what_ends_a_program_wins() -> None:
    with pytest.raises(KeyboardInterrupt), unwrap_single_error():
        raise BaseExceptionGroup("group", [ValueError("a"), KeyboardInterrupt()])


def test_what_is_not_raised_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    errors = [BackendError("first"), *[WriteRefused("b", "second")] * 3]
    with pytest.raises(BackendError, match="first"), unwrap_single_error():
        raise ExceptionGroup("group", errors)
    assert caplog.text.count("second") == 1


async def test_cancellation_goes_through() -> None:
    with anyio.move_on_after(0) as scope:
        async with open_task_group() as group:
            group.start_soon(anyio.sleep_forever)
    assert scope.cancelled_caught


def test_the_package_opens_task_groups_in_one_place_only() -> None:
    package = Path(asyncmq_nats.__file__).parent
    others = [
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if "create_task_group" in path.read_text() and path.name != "_concurrency.py"
    ]
    assert others == []


async def test_the_nearest_of_nested_deadlines_counts() -> None:
    for outer, inner in ((3600, 0.01), (0.01, 3600)):
        with (
            pytest.raises(Unconfirmed, match=r"0\.01 s"),
            anyio.fail_after(60),
            deadline(outer),
            deadline(inner),
        ):
            await anyio.sleep_forever()


async def test_a_deadline_that_is_kept_changes_nothing() -> None:
    with deadline(3600):
        await anyio.lowlevel.checkpoint()
    with pytest.raises(ValueError, match="a fault"), deadline(3600):
        raise ValueError("a fault")
