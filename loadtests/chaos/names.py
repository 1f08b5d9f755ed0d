"""A name server for one machine: each service's name has the addresses of its replicas, as a headless Service has."""

import asyncio
import struct
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address
from typing import Any, Final, cast

DOMAIN: Final = "chaos.test"
_A: Final = 1
_ANSWER_NO_SUCH_NAME: Final = 3


def answer(question: bytes, addresses: Mapping[str, Sequence[str]]) -> bytes:
    """The answer to a DNS query (RFC 1035, section 4.1) with one question. addresses: IPv4 by full lower-case name.

    Raises: ValueError, IndexError or struct.error for what is no query.
    """
    labels, at = [], 12
    while question[at]:
        size = question[at]
        if size > 63:
            raise ValueError("a compressed name in a question")
        labels.append(question[at + 1 : at + 1 + size].decode("ascii").lower())
        at += size + 1
    kind = struct.unpack(">H", question[at + 1 : at + 3])[0]
    asked = question[12 : at + 5]
    known = addresses.get(".".join(labels))
    found = (known or ()) if kind == _A else ()
    records = b"".join(
        # A pointer to the question's name, class IN, to be kept for one second.
        b"\xc0\x0c" + struct.pack(">HHIH", _A, 1, 1, 4) + IPv4Address(address).packed
        for address in found
    )
    flags = 0x8580 | (0 if known is not None else _ANSWER_NO_SUCH_NAME)
    return question[:2] + struct.pack(">HHHHH", flags, 1, len(found), 0, 0) + asked + records


class NameServer(asyncio.DatagramProtocol):
    """Answers over UDP; what is no query is dropped."""

    def __init__(self, addresses: Mapping[str, Sequence[str]]) -> None:
        self._addresses = addresses
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is of no asyncio class.
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: Any) -> None:
        try:
            reply = answer(data, self._addresses)
        except (ValueError, IndexError, struct.error):
            return
        assert self._transport is not None
        self._transport.sendto(reply, addr)
