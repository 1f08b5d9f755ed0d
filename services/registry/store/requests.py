"""Answers by request id."""

from datetime import datetime
from typing import TypeVar

from services.common.errors import Code, FedmeshError
from services.common.postgres import Statements
from services.registry.usecases.ports import Command

T = TypeVar("T")


class PostgresRequests:
    def __init__(self, connection: Statements) -> None:
        self._connection = connection

    async def answer(self, command: Command[T]) -> bytes | None:
        rows = await self._connection.execute(
            "select caller, method, content_sha256, answer from registry.requests where request_id = %s",
            (command.request_id,),
        )
        row = await rows.fetchone()
        if row is None:
            return None
        known = (row["caller"], row["method"], bytes(row["content_sha256"]))
        if known != (str(command.caller), command.method, command.content_sha256):
            raise FedmeshError(
                Code.REQUEST_ID_REUSED, f"request id {command.request_id} belongs to another request: make a new one"
            )
        return bytes(row["answer"])

    async def keep(self, command: Command[T], answer: bytes, at: datetime) -> None:
        await self._connection.execute(
            "insert into registry.requests (request_id, caller, method, content_sha256, answer, created_at)"
            " values (%s, %s, %s, %s, %s, %s)",
            (command.request_id, str(command.caller), command.method, command.content_sha256, answer, at),
        )
