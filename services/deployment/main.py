"""The commands of a deployment: one parser, one line for each command."""

import argparse
import asyncio
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from services.common.config import load_config
from services.common.errors import FedmeshError
from services.common.identity import Kind
from services.common.process import EXIT_CONFIG
from services.common.telemetry import setup_telemetry
from services.deployment.config import CheckConfig, DatabaseConfig, SchemaConfig, SecretsConfig


def main(arguments: Sequence[str]) -> int:
    """Run one command. Returns the exit code: 0, 1 for an error while running, 78 for a wrong configuration."""
    # The first process of a container has no default reaction to SIGTERM.
    signal.signal(signal.SIGTERM, _end)
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], None] = options.run
    try:
        check = getattr(options, "model", None)
        options.loaded = None if check is None else load_config(check, options.config)
    except FedmeshError as error:
        print(f"{options.command}: {error}", file=sys.stderr)
        return EXIT_CONFIG
    if getattr(options, "check_config", False):
        print(f"{options.command}: {options.config} is OK")
        return 0
    try:
        run(options)
    except FedmeshError as error:
        print(f"{options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _end(_signum: int, _frame: FrameType | None) -> None:
    sys.exit(143)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m services.deployment", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, model, run, text in (
        ("database", DatabaseConfig, _database, "make roles, schemas and tables, and set passwords; safe to run twice"),
        ("wait-schema", SchemaConfig, _wait_schema, "wait until a schema is what this release needs"),
        ("secrets", SecretsConfig, _secrets, "make certificates, passwords and the audit key where missing"),
        ("check", CheckConfig, _check, "call every service over mutual TLS"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--config", type=Path, required=True, help="YAML file with the settings")
        command.add_argument("--check-config", action="store_true", help="check the settings, say OK and exit")
        command.set_defaults(run=run, model=model)
    issue = commands.add_parser("issue", help="issue a client certificate by a generated authority")
    issue.add_argument("kind", choices=[Kind.HOSPITAL.value, Kind.OPERATOR.value])
    issue.add_argument("name", help="name in the certificate, such as hospital-01")
    issue.add_argument("--authority", type=Path, required=True, help="folder with ca.pem and ca.key (mode 0600)")
    issue.set_defaults(run=_issue)
    return parser


# Each imports what it needs when it runs: no image has the packages of all commands.


def _database(options: argparse.Namespace) -> None:
    from services.deployment.database import prepare

    for line in prepare(options.loaded):
        print(line, flush=True)


def _wait_schema(options: argparse.Namespace) -> None:
    from services.deployment.database import wait_for_schema

    config: SchemaConfig = options.loaded
    asyncio.run(wait_for_schema(config))
    print(f"schema {config.schema_name} is up to date")


def _secrets(options: argparse.Namespace) -> None:
    from services.deployment.cluster import Cluster
    from services.deployment.secrets import make_secrets

    config: SecretsConfig = options.loaded
    for line in make_secrets(Cluster.of_this_pod(), config):
        print(line, flush=True)


def _check(options: argparse.Namespace) -> None:
    from services.deployment.check import check_services

    setup_telemetry("check", options.loaded.telemetry)
    asyncio.run(check_services(options.loaded, lambda line: print(line, flush=True)))


def _issue(options: argparse.Namespace) -> None:
    from services.embedded.ca import load_ca

    authority = load_ca(options.authority)
    issue = authority.issue_hospital if options.kind == Kind.HOSPITAL.value else authority.issue_operator
    issued = issue(options.name)
    print(f"{issued.certificate}\n{issued.key}\n{issued.ca}")
