"""Searches whose storage does not wait for the disk, which takes longer than what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(autouse=True, scope="package")
def _commits_do_not_wait_for_the_disk() -> Iterator[None]:
    """What that gives up is safety from a power failure, which no test has."""
    sqlalchemy = pytest.importorskip("sqlalchemy")

    def connected(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA synchronous = OFF")

    event = (sqlalchemy.engine.Engine, "connect", connected)
    sqlalchemy.event.listen(*event)
    yield
    sqlalchemy.event.remove(*event)
