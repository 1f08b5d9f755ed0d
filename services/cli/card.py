"""The model card of a version: Markdown made from its plan, its lineage and its checks, and from nothing else."""

from services.cli.lineage import OUTCOMES, Recorded
from services.hospital_node.noise import training_noise


def card(seen: Recorded) -> str:
    """The card. Every sentence follows from what the registry has; what nobody recorded is not said."""
    return (
        "\n\n".join(
            [
                f"# {seen.plan.name}, version {seen.reference}",
                _status(seen),
                f"## What it is\n\n{_model(seen)}",
                f"## How it was made\n\n{_making(seen)}",
                f"## Privacy\n\n{_privacy(seen)}",
                f"## Checks\n\n{_checks(seen)}",
                f"## Where to look\n\n{_digests(seen)}",
            ]
        )
        + "\n"
    )


def _status(seen: Recorded) -> str:
    names = [f"`{one.alias}`" for one in seen.provenance.aliases]
    tags = [f"{_cell(one.key)}: {_cell(one.value)}" for one in seen.provenance.tags]
    lines = [f"Known as {', '.join(names)}." if names else "No alias points to it."]
    if seen.provenance.HasField("rollback"):
        back = seen.provenance.rollback
        lines.append(f"**The job was rolled back** to version {back.good_version}: {back.reason}.")
    if tags:
        lines.append(f"Tags: {'; '.join(tags)}.")
    return "\n\n".join(lines)


def _model(seen: Recorded) -> str:
    manifest = seen.manifest
    label = manifest.feature_schema.label
    described = f"{manifest.description}\n\n" if manifest.description else ""
    return (
        f"{described}A {manifest.model.family} model of `{label.name}` (positive: {', '.join(label.positive)}) from "
        f"{len(manifest.features)} columns of the schema `{manifest.feature_schema.name}`: "
        f"{', '.join(manifest.features)}."
    )


def _making(seen: Recorded) -> str:
    made = [done for done in seen.rounds if not done.burnt]
    burnt = len(seen.rounds) - len(made)
    sizes = sorted({len(done.contributions) for done in made})
    hospitals = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"{sizes[0] if sizes else 0}"
    return (
        f"By `{seen.manifest.algorithm.kind}`, {len(made)} rounds of {hospitals} hospitals each out of a cohort of "
        f"{len(seen.job.hospital_ids)} ({', '.join(seen.job.hospital_ids)}); {burnt} versions were burnt. The plan was "
        f"proposed by {seen.plan.proposed_by} and approved by {seen.plan.approved_by or 'nobody'}."
    )


def _privacy(seen: Recorded) -> str:
    privacy = seen.manifest.privacy
    if privacy is None:
        return "**None.** The plan has no differential privacy; this version can never be promoted."
    if not seen.roster_size:
        return "The job began before there were rosters: its guarantee cannot be stated."
    noise = training_noise(seen.manifest, seen.roster_size)
    text = (
        f"Patient-level differential privacy, {noise.guarantee} for the whole job, with a roster of {seen.roster_size} "
        f"hospitals: noise multiplier {noise.noise_multiplier:.3f} in each of {noise.compositions} releases, each "
        f"patient clipped to {privacy.clip_norm:g}."
    )
    if seen.epsilon_spent is None:
        return f"{text} No charge is known."
    return f"{text} By the hospitals' reports, epsilon {seen.epsilon_spent:.3f} of it was spent."


def _checks(seen: Recorded) -> str:
    rows = ["| check | result | by | why |", "|---|---|---|---|"]
    for one in seen.provenance.checks:
        by = f"{len(one.signed_by)} hospitals" if one.made_by == "hospitals" else one.made_by
        rows.append(f"| {one.check} | {OUTCOMES[one.outcome]} | {by} | {_cell(one.reason)} |")
    return "\n".join(rows)


def _digests(seen: Recorded) -> str:
    rows = [
        "| what | SHA-256 |",
        "|---|---|",
        f"| sealed state | `{seen.version.state_sha256}` |",
        f"| encrypted sum | `{seen.version.round.sum_sha256}` |",
        f"| plan | `{seen.version.plan_id}` |",
        f"| feature schema | `{seen.schema_sha256}` |",
        f"| roster | `{seen.job.roster_sha256}` |",
    ]
    if not seen.provenance.HasField("attestation"):
        return "\n".join(rows)
    made = seen.provenance.attestation
    place = f"entry {made.index}" if made.HasField("index") else "not there yet"
    return "\n".join(rows) + f"\n\nThe signed statement is told to the audit log by event `{made.event_id}` ({place})."


def _cell(text: str) -> str:
    """Text that cannot end a table's cell or begin markup."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
