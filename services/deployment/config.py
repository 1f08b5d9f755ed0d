"""Settings of the deployment's commands."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints

from services.common.config import ClientConfig, PostgresConfig, Section, TelemetryConfig, TlsConfig

ObjectName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]


class DatabaseConfig(Section):
    admin: PostgresConfig = Field(description="a superuser, connected to a database that exists, such as `postgres`")
    database: str = Field(default="fedmesh", description="name of the database, made when missing")
    passwords: dict[str, Path] = Field(description="for each login role the file with its password, on one line")
    patience_s: float = Field(default=300.0, ge=0, le=3600, description="seconds to wait for PostgreSQL to come up")


class SchemaConfig(Section):
    schema_name: str = Field(pattern="^(registry|audit)$", description="`registry` or `audit`")
    postgres: PostgresConfig = Field(description="the database, as the role of the service")
    patience_s: float = Field(default=600.0, ge=0, le=3600, description="seconds to wait")


class CertificateConfig(Section):
    secret: ObjectName = Field(description="Secret to keep the certificate in: tls.crt, tls.key, ca.crt")
    service: str = Field(description="name of the service in the certificate")
    dns: list[str] = Field(default_factory=list, description="host names that the certificate is also valid for")


class PasswordConfig(Section):
    secret: ObjectName = Field(description="Secret to keep the account in: username, password")
    username: str = Field(min_length=1, description="name of the account")


class SecretsConfig(Section):
    namespace: ObjectName = Field(description="where the Secrets are kept")
    labels: dict[str, str] = Field(default_factory=dict, description="labels of Secrets that are made")
    consortium: str = Field(min_length=1, description="trust domain of all certificates")
    authority: ObjectName | None = Field(
        default=None, description="Secret of the certificate authority; null makes no certificates"
    )
    certificates: list[CertificateConfig] = Field(default_factory=list, description="certificates of services")
    passwords: list[PasswordConfig] = Field(default_factory=list, description="accounts with random passwords")
    audit_key: ObjectName | None = Field(
        default=None, description="Secret of the audit log's signing key; null makes none"
    )
    registry_key: ObjectName | None = Field(
        default=None, description="Secret of the key with which the registry signs statements; null makes none"
    )


class CheckedService(ClientConfig):
    service: str = Field(description="full gRPC name that the server must say it serves")
    server_name: str | None = Field(
        default=None, description="host name that its certificate must be for; that of `target` by default"
    )


class CheckConfig(Section):
    tls: TlsConfig = Field(description="a certificate of the consortium")
    services: dict[str, CheckedService] = Field(min_length=1, description="what to call")
    patience_s: float = Field(default=60.0, ge=0, le=600, description="seconds to wait for each service")
    telemetry: TelemetryConfig = Field(default_factory=TelemetryConfig, description="logs and traces")
