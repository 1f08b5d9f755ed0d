"""Checks of one process by its configuration file: what it needs to work, tried with its own certificate.

Everything is looked at as the process itself would: by its certificate, its accounts and its addresses. Nothing is
changed anywhere.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import yaml
from cryptography import x509
from cryptography.exceptions import InvalidSignature

from services.cli.checkup_centre import check_reach
from services.cli.checkup_stores import check_postgres, check_redis
from services.cli.findings import Finding, Level
from services.common.config import Section, TlsConfig, load_config
from services.common.errors import Code, FedmeshError
from services.common.identity import Kind
from services.common.tls import TlsMaterial, load_tls

# Renewal begins well before; what is left then is time enough for a person.
_LEAST_LEFT: Final = 0.2
_LEAST_LEFT_FOR_CA: Final = timedelta(days=30)
_ISSUE: Final = "issue a new certificate (docs/operations.md, Certificates); running processes pick it up"


@dataclass(frozen=True)
class Process:
    """A process by its configuration. part: its name in findings; kind: `hospital` or the service's name."""

    part: str
    kind: str
    config: Any
    tls: TlsConfig
    check: Callable[[Any], None]


def read_process(path: Path) -> Process:
    """Read the configuration of a service or a hospital node.

    Raises: FedmeshError(CONFIG_INVALID), also for a file that configures neither.
    """
    kind = _kind_of(path)
    model, check = _program(kind)
    config: Any = load_config(model, path)
    if kind == "hospital":
        return Process(config.hospital_id, kind, config, config.tls, check)
    return Process(kind, kind, config, config.server.tls, check)


def _kind_of(path: Path) -> str:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FedmeshError(Code.CONFIG_INVALID, f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FedmeshError(Code.CONFIG_INVALID, f"{path} is not valid YAML: {error}") from error
    keys = set(raw) if isinstance(raw, dict) else set()
    # By the sections that no other has together.
    for kind, needed in (
        ("hospital", {"hospital_id"}),
        ("coordinator", {"redis", "aggregator"}),
        ("aggregator", {"redis"}),
        ("registry", {"postgres", "audit"}),
        ("audit", {"postgres", "registry"}),
    ):
        if needed <= keys:
            return kind
    raise FedmeshError(
        Code.CONFIG_INVALID,
        f"{path} configures neither a service nor a hospital node: name the file that one of them is started with",
    )


def _program(kind: str) -> tuple[type[Section], Callable[[Any], None]]:
    """The model of a program's settings, and what `--check-config` runs on them."""
    if kind == "hospital":
        from services.hospital_node.config import HospitalConfig, check_config

        return HospitalConfig, check_config
    if kind == "registry":
        from services.registry.config import RegistryConfig
        from services.registry.main import check as check_registry

        return RegistryConfig, check_registry
    if kind == "audit":
        from services.audit.config import AuditConfig
        from services.audit.main import check as check_audit

        return AuditConfig, check_audit
    if kind == "aggregator":
        from services.aggregator.config import AggregatorConfig
        from services.aggregator.main import check as check_aggregator

        return AggregatorConfig, check_aggregator
    from services.coordinator.config import CoordinatorConfig
    from services.coordinator.main import check as check_coordinator

    return CoordinatorConfig, check_coordinator


def check_settings(process: Process) -> list[Finding]:
    """The settings and the certificate: what can be seen without the network."""
    part = process.part
    try:
        process.check(process.config)
    except FedmeshError as error:
        found = [Finding(Level.FAIL, part, "settings", error.message, "correct the settings: it would not start")]
    else:
        found = [Finding(Level.OK, part, "settings", "what --check-config checks is in order")]
    return [*found, *check_certificate(part, process.kind, process.tls)]


def check_certificate(part: str, kind: str, tls: TlsConfig, now: datetime | None = None) -> list[Finding]:
    """Validity, chain and identity of a certificate, and how long its authorities last. kind: as of `Process`, or
    `operator`."""
    at = now or datetime.now(UTC)
    try:
        material = load_tls(tls, at)
    except FedmeshError as error:
        return [Finding(Level.FAIL, part, "certificate", error.message, _ISSUE)]
    chain = x509.load_pem_x509_certificates(material.certificate_pem)
    authorities = x509.load_pem_x509_certificates(material.ca_pem)
    return [
        _chain(part, chain, authorities, tls),
        _identity(part, kind, material),
        _expiry(part, chain[0], at),
        *_authorities(part, authorities, at),
    ]


def _chain(part: str, chain: list[x509.Certificate], authorities: list[x509.Certificate], tls: TlsConfig) -> Finding:
    for place, certificate in enumerate(chain):
        if any(_issued(certificate, authority) for authority in authorities):
            return Finding(Level.OK, part, "chain", "leads to an authority that this process trusts")
        if place + 1 == len(chain) or not _issued(certificate, chain[place + 1]):
            break
    todo = f"put the authority that issued {tls.certificate} into {tls.ca}, or issue a certificate by one that is there"
    return Finding(Level.FAIL, part, "chain", f"no authority in {tls.ca} issued it", todo)


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _identity(part: str, kind: str, material: TlsMaterial) -> Finding:
    identity = material.identity
    expected = Kind(kind) if kind in (Kind.HOSPITAL, Kind.OPERATOR) else Kind.SERVICE
    # An operator may have any name.
    if identity.kind is not expected or (expected is not Kind.OPERATOR and identity.name != part):
        whose = expected.value if expected is Kind.OPERATOR else f"{expected.value} {part}"
        todo = f"issue a certificate for {whose}: by this one others refuse what it asks"
        return Finding(Level.FAIL, part, "identity", f"the certificate belongs to {identity}", todo)
    return Finding(Level.OK, part, "identity", str(identity))


def _expiry(part: str, certificate: x509.Certificate, at: datetime) -> Finding:
    left = certificate.not_valid_after_utc - at
    whole = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    seen = f"ends {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, in {_span(left)}"
    if left < whole * _LEAST_LEFT:
        return Finding(Level.WARN, part, "expiry", seen, f"its renewal should have come by now: {_ISSUE}")
    return Finding(Level.OK, part, "expiry", seen)


def _authorities(part: str, authorities: list[x509.Certificate], at: datetime) -> list[Finding]:
    first = min(item.not_valid_after_utc for item in authorities)
    if first - at >= _LEAST_LEFT_FOR_CA:
        return []
    seen = f"a trusted authority ends {first:%Y-%m-%d %H:%M} UTC"
    return [Finding(Level.WARN, part, "authority", seen, "see docs/runbooks/FedmeshAuthorityNearExpiry.md")]


def _span(left: timedelta) -> str:
    hours = left.total_seconds() / 3600
    return f"{hours / 24:.0f} days" if hours >= 48 else f"{hours:.1f} h"


async def check_network(process: Process) -> list[Finding]:
    """What the process depends on: its store, and the services that it calls. Some seconds when they are away."""
    config, found = process.config, []
    if process.kind in ("registry", "audit"):
        found += await check_postgres(process.kind, config.postgres)
    if process.kind in ("coordinator", "aggregator"):
        found += await check_redis(process.part, config.redis)
    callees = {name: getattr(config, name, None) for name in ("registry", "coordinator", "aggregator", "audit")}
    witness = getattr(config, "witness", None)
    callees["audit"] = callees["audit"] or getattr(witness, "audit", None)
    try:
        load_tls(process.tls)
    except FedmeshError:
        todo = "first its certificate, above: without one no service can be asked"
        return [*found, Finding(Level.FAIL, process.part, "reaches services", "not tried", todo)]
    for name, client in callees.items():
        if client is not None:
            found += await check_reach(process.part, name, client.target, process.tls)
    return found


async def check_process(path: Path) -> list[Finding]:
    """All checks of one configuration file. Raises: FedmeshError(CONFIG_INVALID) for a file that is none."""
    process = read_process(path)
    return [*check_settings(process), *await check_network(process)]
