"""Where every part listens, and where its proxy does: clients know the proxies alone."""

from dataclasses import dataclass, field
from typing import Any

from loadtests.chaos.names import DOMAIN
from services.embedded.processes import LOOPBACK, free_port

# All of 127.0.0.0/8 is this machine, so replicas of a service can have one port and an address each, as pods have.
_SECOND = {"registry": 1, "audit": 2, "aggregator": 3, "coordinator": 4}


@dataclass
class Addresses:
    """names_port: of the name server. links: every proxy, by the name of the part behind it."""

    names_port: int = field(default_factory=free_port)
    links: dict[str, dict[str, Any]] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    _ports: dict[str, int] = field(default_factory=dict)

    def add_service(self, service: str, replicas: int) -> None:
        """One shared port and one address a replica."""
        self._ports[service] = free_port()
        hosts = [f"127.77.{_SECOND[service]}.{number}" for number in range(1, replicas + 1)]
        self.names[f"{service}.{DOMAIN}"] = hosts
        for number, host in enumerate(hosts, 1):
            self._link(f"{service}-{number}", host, self._ports[service])

    def add_store(self, name: str) -> None:
        """A part with a port of its own, before and behind its proxy."""
        self._link(name, LOOPBACK, free_port())

    def _link(self, name: str, host: str, port: int) -> None:
        self.links[name] = {"name": name, "host": host, "port": port, "to_host": LOOPBACK, "to_port": free_port()}

    def own(self, name: str) -> int:
        """The loopback port where the part itself listens."""
        return int(self.links[name]["to_port"])

    def proxied(self, name: str) -> int:
        """The port of the part's proxy."""
        return int(self.links[name]["port"])

    def target(self, service: str) -> str:
        """The gRPC target with all replicas, by way of the proxies."""
        return f"dns://{LOOPBACK}:{self.names_port}/{service}.{DOMAIN}:{self._ports[service]}"
