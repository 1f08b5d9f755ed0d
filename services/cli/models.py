"""`fedmesh models`: versions, what is known of them, and how they get to production."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import typer
from fedmesh.registry.v1 import promotion_pb2 as pm
from rich.console import Console
from rich.markup import escape

from services.cli.centre import OPERATOR, CentreFile, Place, find_place, require_nowhere
from services.cli.inspection import Limit, list_versions
from services.cli.lineage import OUTCOMES, as_dot, as_json, as_tree, build
from services.cli.mesh import reach
from services.cli.performance import performance
from services.cli.promoting import approve as confirm
from services.cli.promoting import propose, registry_as
from services.cli.pull import pull
from services.cli.stack import DEMO_DIR, DemoDir
from services.cli.tables import make_table
from services.cli.versions import Registry, find_version, read_recorded
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import call
from services.common.ids import new_id

T = TypeVar("T")

app = typer.Typer(help="Model versions: list them, see where they come from, promote them.")
_NEEDS: Final = ("audit", "registry")
Version = Annotated[
    str, typer.Argument(help="JOB/NUMBER (the job's first characters will do), an alias, or MODEL@ALIAS")
]
Operator = Annotated[str, typer.Option(help="Operator of the stack whose certificate is used")]


app.command()(performance)
app.command()(pull)


@app.callback(invoke_without_command=True)
def models(context: typer.Context, folder: DemoDir = None, limit: Limit = 20, centre: CentreFile = None) -> None:
    """List model versions, newest first, when no command is given."""
    if context.invoked_subcommand is None:
        list_versions(find_place(folder, centre, DEMO_DIR), limit)
    else:
        require_nowhere(folder, centre, context.invoked_subcommand)


@app.command()
def lineage(
    version: Version,
    folder: DemoDir = None,
    json: Annotated[bool, typer.Option("--json", help="The graph as JSON: nodes and edges")] = False,
    dot: Annotated[bool, typer.Option("--dot", help="The graph for Graphviz")] = False,
    centre: CentreFile = None,
) -> None:
    """Show what a version came from and what was said of it: plan, data schema, rounds, ciphertexts, checks, people."""
    if json and dot:
        raise FedmeshError(Code.INVALID_ARGUMENT, "--json and --dot exclude each other")
    graph = build(_ask(find_place(folder, centre, DEMO_DIR), lambda registry: read_recorded(registry, version)))
    if json or dot:
        typer.echo(as_json(graph) if json else as_dot(graph))
    else:
        Console().print(as_tree(graph))


@app.command()
def card(
    version: Version,
    folder: DemoDir = None,
    out: Annotated[Path | None, typer.Option(help="Write it here instead of to the terminal")] = None,
    centre: CentreFile = None,
) -> None:
    """Print the model card of a version, in Markdown."""
    from services.cli.card import card as written

    text = written(_ask(find_place(folder, centre, DEMO_DIR), lambda registry: read_recorded(registry, version)))
    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"cannot write {out}: {error.strerror}") from error


@app.command()
def checks(version: Version, folder: DemoDir = None, centre: CentreFile = None) -> None:
    """Show the checks of a version as they stand. Exit code 1 when one of them blocks its promotion."""
    found = _ask(
        find_place(folder, centre, DEMO_DIR), lambda registry: read_recorded(registry, version)
    ).provenance.checks
    table = make_table("check", "result", "made by", "why")
    for one in found:
        passed = one.outcome == pm.CHECK_OUTCOME_PASSED
        colour = "green" if passed else "red"
        by = f"{len(one.signed_by)} hospitals" if one.made_by == "hospitals" else one.made_by
        table.add_row(one.check, f"[{colour}]{OUTCOMES[one.outcome]}[/{colour}]", by, escape(one.reason))
    Console().print(table)
    if any(one.outcome != pm.CHECK_OUTCOME_PASSED for one in found):
        raise typer.Exit(1)


@app.command()
def aliases(folder: DemoDir = None, centre: CentreFile = None) -> None:
    """Show where aliases point."""

    async def read(registry: Registry) -> Any:
        return await call(registry.promotion.ListAliases, pm.ListAliasesRequest())

    table = make_table("model", "alias", "version", "moved by", "promotion")
    for one in _ask(find_place(folder, centre, DEMO_DIR), read).aliases:
        moved_by = one.moved_by.rpartition("/")[2]
        table.add_row(one.model, one.alias, f"{one.job_id}/{one.version}", moved_by, one.promotion_id[:8])
    Console().print(table)


@app.command()
def alias(
    version: Version,
    name: Annotated[str, typer.Argument(help="The alias, such as candidate; production moves by `promote`")],
    folder: DemoDir = None,
    operator: Operator = OPERATOR,
    centre: CentreFile = None,
) -> None:
    """Point an alias at a version."""

    async def move(registry: Registry) -> Any:
        job_id, number = await find_version(registry, version)
        request = pm.SetAliasRequest(request_id=new_id(), alias=name, job_id=job_id, version=number)
        return await call(registry.promotion.SetAlias, request)

    moved = _ask(find_place(folder, centre, DEMO_DIR), move, operator).alias
    _say(f"{moved.model}@{moved.alias} is {moved.job_id}/{moved.version}")


@app.command()
def tag(
    version: Version,
    key: Annotated[str, typer.Argument(help="Lower-case letters, digits, inner dashes")],
    value: Annotated[str, typer.Argument(help="At most 200 characters; empty removes the tag")] = "",
    folder: DemoDir = None,
    operator: Operator = OPERATOR,
    centre: CentreFile = None,
) -> None:
    """Tag a version, or remove a tag from it."""

    async def change(registry: Registry) -> Any:
        job_id, number = await find_version(registry, version)
        request = pm.SetTagRequest(request_id=new_id(), job_id=job_id, version=number, key=key, value=value)
        return await call(registry.promotion.SetTag, request)

    tags = _ask(find_place(folder, centre, DEMO_DIR), change, operator).tags
    _say("tags: " + ("; ".join(f"{one.key} = {one.value}" for one in tags) or "none"))


@app.command()
def promote(
    version: Version,
    to: Annotated[str, typer.Option("--alias", help="The alias that moves")] = "production",
    approve: Annotated[bool, typer.Option("--approve", help="Approve what another operator proposed")] = False,
    reason: Annotated[
        str,
        typer.Option(help="Why a version that an automatic roll-back took away is promoted all the same; both see it"),
    ] = "",
    folder: DemoDir = None,
    operator: Operator = OPERATOR,
    centre: CentreFile = None,
) -> None:
    """Propose to promote a version, or (--approve, as another --operator) approve the newest open proposal."""

    async def go(registry: Registry) -> pm.Promotion:
        job_id, number = await find_version(registry, version)
        if approve:
            return await confirm(registry, job_id, number, to)
        return await propose(registry, job_id, number, to, reason)

    if approve and reason:
        raise FedmeshError(Code.INVALID_ARGUMENT, "the reason is stated by the one who proposes")
    done = _ask(find_place(folder, centre, DEMO_DIR), go, operator)
    named = f"{done.job_id}/{done.version}"
    if done.reason:
        _say(f"[yellow]the divergence check is set aside[/yellow]: {escape(done.reason)}")
    if done.approved_by:
        _say(f"[green]promoted[/green] {done.model}@{done.alias} is {named}")
    else:
        _say(f"proposed {named} for {done.model}@{done.alias}; another operator approves: --approve --operator NAME")


def _say(text: str) -> None:
    Console().print(text, highlight=False, soft_wrap=True)


def _ask(place: Place, question: Callable[[Registry], Coroutine[Any, Any, T]], operator: str = OPERATOR) -> T:
    """Ask the registry, waking a stack if need be."""
    with reach(place, _NEEDS) as centre:

        async def go() -> T:
            async with registry_as(centre, operator) as registry:
                return await question(registry)

        return asyncio.run(go())
