"""`fedmesh login`, `logout`, `whoami`, `policy`: who signs in at this terminal, and who may do what."""

import base64
import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from fedmesh.aggregator.v1 import aggregator_pb2
from fedmesh.audit.v1 import audit_pb2
from fedmesh.coordinator.v1 import coordinator_pb2
from fedmesh.registry.v1 import (
    budget_pb2,
    enrolment_pb2,
    membership_pb2,
    performance_pb2,
    promotion_pb2,
    registry_pb2,
)
from google.protobuf.descriptor import ServiceDescriptor

from services.cli import session
from services.cli.centre import CentreFile, load_centre, named_centre, usual_file
from services.common.errors import Code, FedmeshError
from services.common.grpc.access import Rule, load_policy
from services.common.people.device import Client, Device
from services.common.people.person import person_name

_FILES = (
    registry_pb2,
    promotion_pb2,
    performance_pb2,
    budget_pb2,
    enrolment_pb2,
    membership_pb2,
    coordinator_pb2,
    aggregator_pb2,
    audit_pb2,
)
# Those without a certificate have a door of their own, with nothing in it for people.
_STRANGERS = "EnrolmentService"


def register(app: typer.Typer) -> None:
    """Add the commands to the main command."""
    app.command()(login)
    app.command()(logout)
    app.command()(whoami)
    app.command()(policy)


def login(
    issuer: Annotated[
        str,
        typer.Option(help="OpenID Connect issuer, exactly as it names itself; that of the session before by default"),
    ] = "",
    client_id: Annotated[str, typer.Option(help="What the issuer knows this command as: a public client")] = "",
    scope: Annotated[str, typer.Option(help="Scopes to ask for")] = "openid offline_access",
    token: Annotated[str, typer.Option(help="Which token the mesh reads: `access` or `id`")] = "access",  # noqa: S107 - a kind of token
    ca: Annotated[Path | None, typer.Option(help="PEM file with the authorities of the issuer's HTTPS")] = None,
    centre: CentreFile = None,
) -> None:
    """Sign in with a browser on any device; other commands then act in your name.

    Without --issuer it goes where the centre's file says (`sign_in`), else where the session before went.
    """
    if token not in ("access", "id"):
        raise FedmeshError(Code.INVALID_ARGUMENT, f"--token {token}: use access or id")
    if bool(issuer) != bool(client_id):
        raise FedmeshError(Code.INVALID_ARGUMENT, "--issuer and --client-id go together")
    if issuer and centre is not None:
        raise FedmeshError(Code.INVALID_ARGUMENT, "--issuer and --centre exclude each other: the file names an issuer")
    given = Client(issuer, client_id, scope, token, ca.absolute() if ca else None) if issuer else None
    client = given or _client_of_centre(centre) or _client_before()
    device = Device(client)
    invitation = device.invite()
    typer.echo(f"Open {invitation.url} and enter the code {invitation.code}")
    typer.echo(f"The code is good for {max(0.0, invitation.ends_at - time.time()) / 60:.0f} minutes. Waiting ...")
    path = session.save(client, device.wait(invitation))
    typer.echo(f"Signed in. The session is in {path}")


def _client_of_centre(centre: Path | None) -> Client | None:
    """Who signs people in at the centre that the option, the environment or the usual file names, if one does."""
    named = named_centre(centre)
    if named is not None and (centre is not None or named.config.sign_in is not None):
        return named.client()
    if usual_file().exists() and session.load() is None:
        return load_centre(usual_file()).client()
    return None


def _client_before() -> Client:
    """What the session of before signed in with."""
    before = session.load()
    if before is None:
        raise FedmeshError(
            Code.INVALID_ARGUMENT,
            "sign in where? Give --issuer and --client-id: `fedmesh up` prints those of a stack of its own, others tell"
            " the consortium's people",
        )
    return before[0]


def logout() -> None:
    """Forget the session of this terminal. The issuer's own session in the browser stays."""
    path = session.session_file()
    if not path.exists():
        typer.echo("Nobody is signed in.")
        return
    path.unlink()
    typer.echo("Signed out.")


def whoami() -> None:
    """Show who is signed in, by the token in the session."""
    token = session.bearer()
    if token is None:
        raise FedmeshError(Code.UNAUTHENTICATED, "nobody is signed in: run `fedmesh login`")
    claims = _claims(token)
    # An issuer's words, not a server's: the mesh maps them to roles by its own configuration.
    typer.echo(f"acts as   {person_name(str(claims.get('sub', '')))}")
    for name in ("iss", "sub", "aud", "roles", "groups", "amr", "acr"):
        if name in claims:
            typer.echo(f"{name:<10}{json.dumps(claims[name], ensure_ascii=True)}")


def _claims(token: str) -> dict[str, Any]:
    try:
        piece = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(piece + "=" * (-len(piece) % 4)))
    except (IndexError, ValueError) as error:
        raise FedmeshError(
            Code.INVALID_ARGUMENT, "the token is not a JSON Web Token: sign in with --token id, or another scope"
        ) from error
    return claims if isinstance(claims, dict) else {}


def policy() -> None:
    """Print who may call what, as the servers enforce it: callers, roles, second factor (MFA), second person."""
    lines = [("method", "callers", "roles of people", "MFA", "second person")]
    for service in _services():
        rules = load_policy([service])
        lines += [
            _line(f"{service.name}.{method.name}", rules[f"/{service.full_name}/{method.name}"])
            for method in service.methods
        ]
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    for line in lines:
        typer.echo("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def _services() -> list[ServiceDescriptor]:
    named = [service for file in _FILES for service in file.DESCRIPTOR.services_by_name.values()]
    return [service for service in named if service.name != _STRANGERS]


def _line(name: str, rule: Rule) -> tuple[str, str, str, str, str]:
    callers = sorted(only or kind.value for kind, only in rule.allow)
    return (
        name,
        ", ".join(callers),
        ", ".join(sorted(rule.roles)),
        "yes" if rule.mfa else "",
        "yes" if rule.second_person else "",
    )
