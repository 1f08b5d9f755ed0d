"""The lineage of a model version as a graph, and as a tree, JSON or DOT."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from fedmesh.registry.v1 import promotion_pb2, registry_pb2
from rich.markup import escape
from rich.tree import Tree

from services.plans.manifest import PlanManifest

OUTCOMES: Final = {
    promotion_pb2.CHECK_OUTCOME_PASSED: "passed",
    promotion_pb2.CHECK_OUTCOME_FAILED: "failed",
    promotion_pb2.CHECK_OUTCOME_MISSING: "missing",
}


@dataclass(frozen=True)
class Recorded:
    """What the registry has of a version. roster_size: 0 for a job from before there were rosters."""

    version: registry_pb2.ModelVersion
    plan: registry_pb2.Plan
    manifest: PlanManifest
    job: registry_pb2.Job
    rounds: tuple[registry_pb2.CommittedRound, ...]
    provenance: promotion_pb2.GetProvenanceResponse
    schema_sha256: str
    roster_size: int
    epsilon_spent: float | None

    @property
    def reference(self) -> str:
        return f"{self.version.job_id}/{self.version.version}"


@dataclass(frozen=True)
class Node:
    """A thing in the graph: `kind` says what it is, `text` names it for people."""

    id: str
    kind: str
    text: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Edge:
    """`source` relates to `target`, as `relation` says."""

    source: str
    target: str
    relation: str


@dataclass
class Graph:
    """Nodes in the order in which they were added, the version first."""

    nodes: list[Node] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)

    def add(self, node: Node, source: str = "", relation: str = "") -> str:
        self.nodes.append(node)
        if source:
            self.edges.append(Edge(source, node.id, relation))
        return node.id


def build(seen: Recorded) -> Graph:
    """The version with everything that it came from and that was said of it."""
    graph, told = Graph(), seen.version
    root = graph.add(Node(f"version:{seen.reference}", "version", seen.reference, {"state_sha256": told.state_sha256}))
    plan = graph.add(
        Node(f"plan:{told.plan_id}", "plan", told.plan_name, {"plan_id": told.plan_id, "name": told.plan_name}),
        root,
        "made by",
    )
    graph.add(Node(f"schema:{seen.schema_sha256}", "schema", seen.schema_sha256, {}), plan, "asks for data of")
    for who, relation in ((seen.plan.proposed_by, "proposed by"), (seen.plan.approved_by, "approved by")):
        if who:
            graph.add(Node(f"person:{relation}:{who}", "person", who), plan, relation)
    _add_privacy(graph, root, seen)
    parent = told.version - 1
    if parent:
        graph.add(Node(f"version:{told.job_id}/{parent}", "version", f"{told.job_id}/{parent}"), root, "parent")
    for done in seen.rounds:
        _add_round(graph, root, done)
    _add_words(graph, root, seen.provenance)
    return graph


def _add_privacy(graph: Graph, root: str, seen: Recorded) -> None:
    privacy = seen.manifest.privacy
    if privacy is None:
        graph.add(Node("privacy", "privacy", "none: can never be promoted"), root, "privacy")
        return
    charged = max((item.charged for item in seen.provenance.charges), default=0)
    facts: dict[str, Any] = {"epsilon": privacy.epsilon, "delta": privacy.delta, "charged": charged}
    text = f"promised epsilon {privacy.epsilon:g}, delta {privacy.delta:g}"
    if seen.epsilon_spent is not None:
        facts["epsilon_spent"] = round(seen.epsilon_spent, 6)
        text += f"; spent {seen.epsilon_spent:.3f} in {charged} attempts"
    graph.add(Node("privacy", "privacy", text, facts), root, "privacy")


def _add_round(graph: Graph, root: str, done: registry_pb2.CommittedRound) -> None:
    what = f"burnt: {done.burnt_reason}" if done.burnt else f"{len(done.contributions)} hospitals"
    facts = {"sum_sha256": done.sum_sha256, "state_sha256": done.state_sha256, "burnt": done.burnt}
    text = f"{done.version}, attempt {done.attempt.attempt}, {what}"
    round_id = graph.add(Node(f"round:{done.version}", "round", text, facts), root, "round")
    for item in done.contributions:
        graph.add(
            Node(
                f"ciphertext:{item.ciphertext_sha256}",
                "ciphertext",
                f"{item.hospital_id} {item.ciphertext_sha256}",
                {"hospital_id": item.hospital_id, "sha256": item.ciphertext_sha256},
            ),
            round_id,
            "sums",
        )


def _add_words(graph: Graph, root: str, said: promotion_pb2.GetProvenanceResponse) -> None:
    for check in said.checks:
        outcome = OUTCOMES[check.outcome]
        facts = {"outcome": outcome, "figures": json.loads(check.figures_json), "signed_by": list(check.signed_by)}
        text = f"{check.check} {outcome} ({check.made_by}): {check.reason}"
        graph.add(Node(f"check:{check.check}", "check", text, facts), root, "checked")
    for one in said.promotions:
        text = f"to {one.alias}, proposed by {_short(one.proposed_by)}, "
        text += f"approved by {_short(one.approved_by)}" if one.approved_by else "waits for a second person"
        text += f"; divergence set aside: {one.reason}" if one.reason else ""
        facts = {"proposed_by": one.proposed_by, "approved_by": one.approved_by, "reason": one.reason}
        graph.add(Node(f"promotion:{one.promotion_id}", "promotion", text, facts), root, "promoted")
    if said.HasField("rollback"):
        back = said.rollback
        text = f"version {back.good_version} is the job's result: {back.reason}"
        graph.add(Node("rollback", "rollback", text, {"good_version": back.good_version}), root, "rolled back")
    if said.HasField("attestation"):
        place = f"entry {said.attestation.index}" if said.attestation.HasField("index") else "not in the log yet"
        graph.add(Node(f"event:{said.attestation.event_id}", "attestation", place), root, "attested")
    for alias in said.aliases:
        graph.add(Node(f"alias:{alias.model}@{alias.alias}", "alias", f"{alias.model}@{alias.alias}"), root, "known as")
    for tag in said.tags:
        graph.add(Node(f"tag:{tag.key}", "tag", f"{tag.key} = {tag.value}"), root, "tagged")


def as_tree(graph: Graph) -> Tree:
    """The graph as a tree for a terminal, each node under the one that it was reached from."""
    by_id = {node.id: node for node in graph.nodes}
    root = graph.nodes[0]
    branches = {root.id: Tree(f"[bold]version {escape(root.text)}[/bold]")}
    state = root.facts["state_sha256"]
    branches[root.id].add(f"state {state}" if state else "state none: every version so far was burnt")
    for edge in graph.edges:
        node = by_id[edge.target]
        text = escape(node.text)
        if node.facts.get("outcome") in ("failed", "missing"):
            text = f"[red]{text}[/red]"
        branches[edge.target] = branches[edge.source].add(f"[dim]{edge.relation}[/dim] {text}")
    return branches[root.id]


def as_json(graph: Graph) -> str:
    return json.dumps(
        {"nodes": [asdict(node) for node in graph.nodes], "edges": [asdict(edge) for edge in graph.edges]}, indent=2
    )


def as_dot(graph: Graph) -> str:
    """The graph in Graphviz's language."""
    lines = ["digraph lineage {", "  rankdir=LR;", "  node [shape=box, fontname=Helvetica];"]
    lines += [f"  {_quoted(node.id)} [label={_quoted(f'{node.kind}: {node.text}')}];" for node in graph.nodes]
    lines += [
        f"  {_quoted(edge.source)} -> {_quoted(edge.target)} [label={_quoted(edge.relation)}];" for edge in graph.edges
    ]
    return "\n".join([*lines, "}"])


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _short(spiffe_id: str) -> str:
    return spiffe_id.rpartition("/")[2]
