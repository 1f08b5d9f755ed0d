"""Strict configuration: one YAML file per process, unknown keys fail, secrets only by file path."""

import os
import stat
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal, TypeVar
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from services.common.errors import Code, FedmeshError

Address = Annotated[str, StringConstraints(pattern=r"^(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):\d{1,5}$")]
"""`host:port`, with an IPv6 host in brackets."""


# Asymmetric ones only: with an HMAC the issuer's public key would be a secret, and `none` is no signature.
Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
RoleName = Literal["researcher", "hospital-admin", "consortium-admin", "auditor", "sre"]


class Section(BaseModel):
    """A part of a configuration: frozen, and every unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TlsConfig(Section):
    ca: Path = Field(description="PEM file with the consortium's CA certificates")
    certificate: Path = Field(description="PEM file with this process's certificate chain; reloaded when it changes")
    key: Path = Field(description="PEM file with the private key, readable by this user only")


class MfaConfig(Section):
    amr: frozenset[str] = Field(
        default=frozenset({"mfa", "otp", "hwk", "fido"}),
        description="values of `amr`, each of which means a second factor",
    )
    acr: frozenset[str] = Field(default=frozenset(), description="values of `acr` that mean a second factor")


class PeopleConfig(Section):
    issuer: str = Field(description="OpenID Connect issuer, exactly as its tokens say it in `iss`")
    audience: str = Field(min_length=1, description="what tokens for this mesh say in `aud`")
    jwks_url: str | None = Field(
        default=None, description="where the issuer's keys are; by default, as its discovery says"
    )
    ca: Path | None = Field(
        default=None, description="PEM file with the authorities of the issuer's HTTPS; the system's by default"
    )
    algorithms: frozenset[Algorithm] = Field(
        default=frozenset({"RS256", "ES256"}), min_length=1, description="signature algorithms that are accepted"
    )
    allow_loopback_issuer: bool = Field(
        default=False,
        description="take tokens of an issuer on this machine, such as that of `fedmesh up --sign-in`: for development",
    )
    role_claim: str = Field(default="roles", min_length=1, description="claim with the person's roles or groups")
    roles: dict[str, RoleName] = Field(min_length=1, description="fedmesh's role for each value of that claim")
    mfa: MfaConfig = MfaConfig()
    leeway_s: float = Field(default=30.0, ge=0, le=300, description="seconds that the clocks may differ by")
    max_age_s: float = Field(
        default=12 * 3600.0,
        ge=60,
        le=7 * 86400,
        description="seconds after which a person must sign in anew (`auth_time`)",
    )
    keys_fresh_s: float = Field(default=300.0, ge=1, le=86400, description="seconds after which keys are fetched anew")
    keys_stale_s: float = Field(
        default=3600.0, ge=0, le=86400, description="seconds for which keys are used while the issuer cannot be reached"
    )

    @model_validator(mode="after")
    def _trusted(self) -> "PeopleConfig":
        for key, url in (("issuer", self.issuer), ("jwks_url", self.jwks_url)):
            if url is not None and not self.trusts(url):
                raise ValueError(f"{key} must be an https:// URL, and not of this machine's loopback ({url})")
        return self

    def trusts(self, url: str) -> bool:
        """Whether keys and tokens may come from there."""
        return is_safe_url(url) and (self.allow_loopback_issuer or not is_loopback_url(url))


def is_safe_url(url: str) -> bool:
    """True for HTTPS, and for HTTP that does not leave this machine."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        return False
    if parts.scheme == "http":
        return is_loopback_url(url)
    return parts.scheme == "https" and bool(host)


def is_loopback_url(url: str) -> bool:
    """Whether a URL names this machine's loopback."""
    host = (urlsplit(url).hostname or "").rstrip(".")
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class LimitsConfig(Section):
    """What one server lets clients take of it at once."""

    calls: int = Field(
        default=4096, ge=1, le=1_000_000, description="calls in flight, streams included; more are told to come again"
    )
    calls_of_one: int = Field(
        default=512, ge=1, le=1_000_000, description="of these, calls in flight of one identity; services are exempt"
    )
    calls_per_s_of_one: float = Field(
        default=200.0,
        gt=0,
        le=1_000_000,
        description="calls a second that one identity may begin, for ever; services are exempt",
    )
    burst_of_one: int = Field(
        default=1000, ge=1, le=10_000_000, description="calls that one identity may begin at once, after a rest"
    )
    connections: int = Field(
        default=2048, ge=1, le=1_000_000, description="connections, unused ones included; more are hung up on"
    )
    metadata_bytes: int = Field(
        default=16_384, ge=4096, le=1_048_576, description="metadata of one call, above which it is refused"
    )
    handshake_s: float = Field(
        default=20.0, ge=1, le=300, description="seconds to finish TLS and HTTP/2's first frame in"
    )
    message_s: float = Field(
        default=30.0, gt=0, le=600, description="seconds in which the first message of a call must come"
    )


class RefusalsConfig(Section):
    """Where refused calls wait until the audit log has them."""

    directory: Path | None = Field(
        default=None,
        description="folder of this process alone, made when it is not there; without it they wait in memory and are "
        "lost with the process",
    )
    max_bytes: int = Field(
        default=16 << 20,
        ge=4 << 20,
        le=1 << 30,
        description="of the files in it; what would take more is told by its number alone",
    )


class ServerConfig(Section):
    listen: Address = Field(description="host:port of the mTLS listener")
    health_listen: Address | None = Field(
        default=None,
        description="host:port of a plaintext listener that serves grpc.health.v1 and nothing else, for probes",
    )
    metrics_listen: Address | None = Field(default=None, description="host:port of the Prometheus metrics page")
    tls: TlsConfig
    people: PeopleConfig | None = Field(
        default=None, description="how operators sign in; without it, an operator's certificate alone is enough"
    )
    drain_s: float = Field(
        default=10.0, ge=0, le=600, description="seconds that calls in flight get to finish after SIGTERM"
    )
    max_connection_age_s: float = Field(
        default=3600.0, ge=10, description="seconds after which a client is asked to connect anew, to spread load"
    )
    limits: LimitsConfig = Field(default=LimitsConfig(), description="what clients may take at once")
    refusals: RefusalsConfig = Field(default=RefusalsConfig(), description="where refused calls wait for the audit log")


class ClientConfig(Section):
    target: str = Field(description="gRPC target, such as 127.0.0.1:7001 or dns:///registry.fedmesh.svc:7001")


class PostgresConfig(Section):
    dsn: str = Field(description="libpq connection string without a password")
    password_file: Path | None = Field(default=None, description="file with the password on one line")
    pool_max: int = Field(default=8, ge=1, le=200, description="most connections at once")


class SentinelConfig(Section):
    addresses: tuple[Address, ...] = Field(min_length=1, description="host:port of the Sentinels, asked in turn")
    master: str = Field(default="fedmesh", min_length=1, description="name under which they watch the master")


class RedisConfig(Section):
    url: str = Field(description="redis://host:port/0, rediss://host:port/0 or unix:///path without credentials")
    username: str = Field(description="ACL user of this service")
    password_file: Path | None = Field(default=None, description="file with the password on one line")
    sentinel: SentinelConfig | None = Field(
        default=None,
        description="ask these for the master, as the same user; of `url` only scheme (TLS or not), database and "
        "parameters count then",
    )


class TelemetryConfig(Section):
    log_level: str = Field(default="info", pattern="^(debug|info|warning|error)$")
    log_format: str = Field(default="json", pattern="^(json|console)$")
    trace_file: Path | None = Field(
        default=None, description="append finished spans to this file, one JSON object a line"
    )
    otlp_endpoint: str | None = Field(default=None, description="send spans to this OTLP/gRPC collector")
    trace_calls: float = Field(
        default=0.01, ge=0, le=1, description="part of the calls outside of rounds whose traces are kept"
    )


ConfigT = TypeVar("ConfigT", bound=Section)


def load_config(model: type[ConfigT], path: Path) -> ConfigT:
    """Read and check a configuration file. Relative paths in it are relative to the working directory.

    Raises: FedmeshError(CONFIG_INVALID) naming the file and every wrong key.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FedmeshError(Code.CONFIG_INVALID, f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FedmeshError(Code.CONFIG_INVALID, f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise FedmeshError(Code.CONFIG_INVALID, f"{path} must be a YAML mapping of settings")
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise FedmeshError(Code.CONFIG_INVALID, f"{path}: {describe_validation(error)}") from error


def describe_validation(error: ValidationError) -> str:
    """All problems of a validation in one line: `field.path: what is wrong (got value)`."""
    problems = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"]) or "(top level)"
        got = item.get("input")
        shown = f" (got {got!r})" if isinstance(got, str | int | float | bool) else ""
        problems.append(f"{where}: {item['msg']}{shown}")
    return "; ".join(problems)


def read_secret(path: Path) -> str:
    """Read a one-line secret.

    Raises: FedmeshError(CONFIG_INVALID) when the file is missing, empty or open to other users.
    """
    require_private(path)
    try:
        secret = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise FedmeshError(Code.CONFIG_INVALID, f"cannot read secret file {path}: {error.strerror}") from error
    if not secret:
        raise FedmeshError(Code.CONFIG_INVALID, f"secret file {path} is empty")
    return secret


def require_private(path: Path, what: str = "a secret") -> None:
    """Refuse a secret's file that other users can reach. Mode 0600 or less, by libpq's rule for client keys.

    A file of root's may also be readable (never writable) by a group: that is how Kubernetes mounts a Secret for a
    process of another user.

    Raises: FedmeshError(CONFIG_INVALID), also when there is no such file.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise FedmeshError(Code.CONFIG_INVALID, f"cannot read {path} ({what}): {error.strerror}") from error
    allowed = 0o740 if found.st_uid == 0 and os.geteuid() != 0 else 0o700
    if stat.S_IMODE(found.st_mode) & 0o777 & ~allowed:
        raise FedmeshError(Code.CONFIG_INVALID, f"{path} ({what}) is open to other users: chmod 600 it")
