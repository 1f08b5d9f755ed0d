"""Fixtures of the registry's integration tests."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.registry.harness import Registry, running_registry
from tests.support.stores import PostgresDatabase


@pytest.fixture
async def registry(postgres: PostgresDatabase, tmp_path: Path) -> AsyncIterator[Registry]:
    """A registry on an empty database."""
    async with running_registry(postgres, tmp_path) as running:
        yield running
