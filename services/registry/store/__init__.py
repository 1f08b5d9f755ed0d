"""The registry's PostgreSQL store."""

from pathlib import Path
from typing import Final

SCHEMA: Final = "registry"
MIGRATIONS: Final[Path] = Path(__file__).parent / "migrations"
"""Plain SQL files, applied in order by the role `registry_migrator`."""
