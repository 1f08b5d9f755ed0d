"""Keepalive pings, both ends' settings: a server hangs up on a client that pings more often than it allows.

A firewall or NAT forgets quiet connections, and a dead peer is noticed only by a ping: hospitals wait for tasks on
streams that may be silent for hours, and the services' channels to each other are idle between rounds.

By gRPC's rules (proposal A8, doc/keepalive.md) pings sooner than the server's least interval are strikes, and too many
of them end the connection with GOAWAY ENHANCE_YOUR_CALM "too_many_pings". The names are gRPC's own:
`GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS` is spelt without "recv", and unknown options pass in silence.
"""

from typing import Final

INTERVAL_MS: Final = 20_000
# Long enough for a process that waits for its turn on a busy machine.
TIMEOUT_MS: Final = 10_000
# A ping may come early: timers are coarse, and a reply's way is not always equally long.
_ALLOWED_PART: Final = 4


def client_keepalive(interval_ms: int = INTERVAL_MS) -> list[tuple[str, int]]:
    """Channel options: ping a quiet connection every `interval_ms`, for as long as it is quiet."""
    return [
        ("grpc.keepalive_time_ms", interval_ms),
        ("grpc.keepalive_timeout_ms", TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        # 0: no limit. By default the third ping without data in between is held back, and a dead peer goes unnoticed.
        ("grpc.http2.max_pings_without_data", 0),
    ]


def server_keepalive(interval_ms: int = INTERVAL_MS) -> list[tuple[str, int]]:
    """Server options that go with `client_keepalive(interval_ms)`; the server pings its clients as often."""
    return [
        *client_keepalive(interval_ms),
        ("grpc.http2.min_ping_interval_without_data_ms", interval_ms // _ALLOWED_PART),
    ]
