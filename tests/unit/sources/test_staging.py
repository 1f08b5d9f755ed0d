from datetime import date, datetime, timedelta

import duckdb
import pytest

from services.hospital_node.sources.staging import set_extract

FAR = date(2999, 1, 1)


@pytest.mark.parametrize("until", [None, FAR, date(2020, 2, 29)])
def test_data_reaches_no_further_than_today(until: date | None) -> None:
    """A mistyped year, in the data or in the configuration, is no observation."""
    before = datetime.now().astimezone().date()
    database = duckdb.connect()
    set_extract(database, until, has_procedures=True)
    (found,) = database.execute("SELECT until FROM extract").fetchone() or (None,)
    assert found == until if until == date(2020, 2, 29) else found in (before, before + timedelta(days=1))
