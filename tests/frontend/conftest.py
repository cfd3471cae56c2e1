"""What the frontend's tests share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

Left = Callable[[], set["asyncio.Task[Any]"]]


@pytest.fixture
def tasks_left() -> Left:
    """Gives the tasks of the running loop, without the test's own and its runner's."""

    def left() -> set[asyncio.Task[Any]]:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        return {task for task in others if "TestRunner" not in repr(task.get_coro())}

    return left
