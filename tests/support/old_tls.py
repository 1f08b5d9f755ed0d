"""A gRPC call over TLS 1.2, which gRPC's own clients cannot be made to send."""

import asyncio
import ssl


async def over_tls12(context: ssl.SSLContext, port: int, method: str) -> bytes:
    """What a server on this machine sends in answer to an empty message, up to a word about TLS."""
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")
    # HTTP/2: preface, empty SETTINGS, HEADERS on stream 1 (literal header fields without indexing), empty message.
    headers = b"\x83\x87" + b"".join(
        b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value
        for name, value in (
            (b":path", method.encode()),
            (b":authority", b"localhost"),
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
            (b"grpc-timeout", b"5S"),
        )
    )
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, b"") + _frame(1, 4, 1, headers))
    writer.write(_frame(0, 1, 1, b"\x00\x00\x00\x00\x00"))
    await writer.drain()
    received = b""
    while b"TLS" not in received:
        part = await asyncio.wait_for(reader.read(4096), 20)
        assert part, "the connection was closed without the reason"
        received += part
    writer.close()
    return received


def _frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream_id.to_bytes(4, "big") + payload
