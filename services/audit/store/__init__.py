"""The audit service's PostgreSQL store."""

from pathlib import Path
from typing import Final

SCHEMA: Final = "audit"
MIGRATIONS: Final[Path] = Path(__file__).parent / "migrations"
"""Plain SQL files, applied in order by the role `audit_migrator`."""
