"""Which centre a command talks to: a stack on this machine, or services elsewhere that a file names."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import typer
from pydantic import Field, StringConstraints

from services.cli import session
from services.common.config import Address, Section, TlsConfig, load_config, require_private
from services.common.errors import Code, FedmeshError
from services.common.identity import Kind
from services.common.people.device import Client
from services.common.tls import load_tls
from services.embedded.stack import ENROLMENT, SERVICES, Stack

OPERATOR: Final = "operator"
VARIABLE: Final = "FEDMESH_CENTRE"

CentreFile = Annotated[
    Path | None,
    typer.Option(
        "--centre",
        help=f"File that says where a centre elsewhere is, and as whom to call; else {VARIABLE}, else "
        "~/.config/fedmesh/centre.yaml (docs/operations.md)",
    ),
]
Target = Annotated[
    str, StringConstraints(pattern=r"^(dns:(//[A-Za-z0-9.:_-]*/)?)?(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):\d{1,5}$")
]


class TargetConfig(Section):
    target: Target = Field(description="host:port, or dns:///host:port to spread calls over all addresses of a name")
    server_name: str | None = Field(
        default=None,
        min_length=1,
        description="host name that the service's certificate must be for, where it is not that of `target`",
    )


class SignInConfig(Section):
    issuer: str = Field(description="OpenID Connect issuer, exactly as it names itself")
    client_id: str = Field(min_length=1, description="what the issuer knows this command as: a public client")
    scope: str = Field(default="openid offline_access", description="scopes to ask for")
    token: Literal["access", "id"] = Field(default="access", description="which token the mesh reads")
    ca: Path | None = Field(
        default=None, description="PEM file with the authorities of the issuer's HTTPS; the system's by default"
    )


class CentreConfig(Section):
    """A centre as an operator reaches it. Relative paths are relative to the file that they stand in."""

    registry: TargetConfig
    coordinator: TargetConfig
    aggregator: TargetConfig
    audit: TargetConfig
    operator: TlsConfig = Field(description="the operator's certificate, and the authorities of the services")
    sign_in: SignInConfig | None = Field(
        default=None, description="where people sign in; only tokens of this issuer are sent to this centre"
    )
    enrolment: Address | None = Field(
        default=None, description="host:port at which hospitals enrol, for `fedmesh members invite` to print"
    )
    log_key: Path | None = Field(default=None, description="file with the audit log's public key")
    roster: Path | None = Field(default=None, description="the founding roster, to count the log's witnesses by")


@dataclass(frozen=True)
class RemoteCentre:
    """A centre that a file names, in the words of `Stack`: targets, certificates, keys."""

    file: Path
    config: CentreConfig

    def target(self, service: str) -> str:
        """The gRPC target of a service, or where hospitals enrol.

        Raises: FedmeshError(CONFIG_INVALID) when the file does not say where hospitals enrol.
        """
        if service == ENROLMENT:
            if self.config.enrolment is None:
                raise FedmeshError(Code.CONFIG_INVALID, f"{self.file} does not say where hospitals enrol (`enrolment`)")
            return self.config.enrolment
        return self._named(service).target

    def server_name(self, service: str) -> str | None:
        """The name that a service's certificate must be for; None for the target's own."""
        return self._named(service).server_name

    def _named(self, service: str) -> TargetConfig:
        assert service in SERVICES, service
        named: TargetConfig = getattr(self.config, service)
        return named

    def operator(self, name: str = OPERATOR) -> TlsConfig:
        """The operator's certificate.

        Raises: FedmeshError(CONFIG_INVALID) for one that is expired, unreadable or no operator's; (INVALID_ARGUMENT)
            when another operator is named: it has a file of its own.
        """
        if name != OPERATOR:
            raise FedmeshError(
                Code.INVALID_ARGUMENT,
                f"--operator {name}: {self.file} names one operator's certificate; another operator has another file, "
                "or signs in (`fedmesh login`)",
            )
        tls = self.config.operator
        identity = load_tls(tls).identity
        if identity.kind is not Kind.OPERATOR:
            raise FedmeshError(
                Code.CONFIG_INVALID, f"{self.file}: {tls.certificate} belongs to {identity}, which is no operator"
            )
        return tls

    @property
    def ca_file(self) -> Path:
        return self.config.operator.ca

    @property
    def audit_verifier(self) -> Path:
        """The audit log's public key. Raises: FedmeshError(CONFIG_INVALID) when the file does not name it."""
        if self.config.log_key is None:
            raise FedmeshError(Code.CONFIG_INVALID, f"{self.file} does not name the audit log's public key (`log_key`)")
        return self.config.log_key

    @property
    def roster_file(self) -> Path | None:
        """The founding roster, if the file names it."""
        return self.config.roster

    def bearer(self) -> str | None:
        """The token of who signed in, if there is one for this centre."""
        sign_in = self.config.sign_in
        return session.bearer_if_any(sign_in.issuer if sign_in else None)

    def client(self) -> Client:
        """What `fedmesh login` signs in with. Raises: FedmeshError(CONFIG_INVALID) when the file does not say."""
        found = self.config.sign_in
        if found is None:
            raise FedmeshError(Code.CONFIG_INVALID, f"{self.file} does not say where people sign in (`sign_in`)")
        return Client(found.issuer, found.client_id, found.scope, found.token, found.ca)


Centre = Stack | RemoteCentre
# A stack's folder, whether it is there or not, or a centre elsewhere.
Place = Path | RemoteCentre


def find_place(folder: Path | None, centre: Path | None, default: Path) -> Place:
    """What a command talks to: what its options name, else the environment, else what is found.

    folder, centre: `--dir` and `--centre`. default: the folder of a stack where neither is given.

    Raises: FedmeshError(INVALID_ARGUMENT) when both are given, or both are found and neither is given;
        (CONFIG_INVALID) for a wrong file.
    """
    if folder is not None and centre is not None:
        raise FedmeshError(
            Code.INVALID_ARGUMENT,
            "--dir and --centre exclude each other: a stack on this machine, or a centre elsewhere",
        )
    if folder is not None:
        return stack_dir(folder)
    named = named_centre(centre)
    if named is not None:
        return named
    own, usual = stack_dir(default), usual_file()
    if not usual.exists():
        return own
    if Stack(own).exists():
        raise FedmeshError(
            Code.INVALID_ARGUMENT,
            f"there is a stack in {default}, and {usual} names a centre: say which by --dir or --centre",
        )
    return load_centre(usual)


def named_centre(centre: Path | None) -> RemoteCentre | None:
    """The centre that the option or the environment names. Raises: FedmeshError(CONFIG_INVALID)."""
    if centre is not None:
        return load_centre(centre)
    variable = os.environ.get(VARIABLE)
    if not variable:
        return None
    try:
        return load_centre(Path(variable))
    except FedmeshError as error:
        raise FedmeshError(error.code, f"{VARIABLE}: {error.message}") from error


def require_nowhere(folder: Path | None, centre: Path | None, command: str) -> None:
    """A group's own `--dir` and `--centre` do not count for its commands: better refused than overlooked.

    Raises: FedmeshError(INVALID_ARGUMENT).
    """
    if folder is not None or centre is not None:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"put --dir or --centre after `{command}`")


def usual_file() -> Path:
    """Where the file of a centre is looked for when nothing names one."""
    return session.config_folder() / "centre.yaml"


def load_centre(file: Path) -> RemoteCentre:
    """Read the file of a centre; nothing is asked of anybody.

    Raises: FedmeshError(CONFIG_INVALID) naming the file and what is wrong, also for a private key that others can read.
    """
    config = _anchored(load_config(CentreConfig, file), file.absolute().parent)
    require_private(config.operator.key, "the operator's private key")
    for key, path in (("log_key", config.log_key), ("roster", config.roster)):
        if path is not None and not path.is_file():
            raise FedmeshError(Code.CONFIG_INVALID, f"{file}: {key}: there is no file {path}")
    return RemoteCentre(file, config)


def _anchored(config: CentreConfig, folder: Path) -> CentreConfig:
    """The same with whole paths. An operator calls from any folder; a service is started in its own."""

    def whole(path: Path | None) -> Path | None:
        return None if path is None else folder / path.expanduser()

    tls = config.operator
    paths = {name: whole(getattr(tls, name)) for name in ("ca", "certificate", "key")}
    sign_in = config.sign_in
    return config.model_copy(
        update={
            "operator": tls.model_copy(update=paths),
            "sign_in": None if sign_in is None else sign_in.model_copy(update={"ca": whole(sign_in.ca)}),
            "log_key": whole(config.log_key),
            "roster": whole(config.roster),
        }
    )


def stack_dir(folder: Path) -> Path:
    """The demo keeps its stack in a folder of its own."""
    return folder / "stack" if (folder / "stack").is_dir() else folder
