"""Asks an advisory database for known weaknesses of what the images install, by uv.lock.

Usage: python scripts/check_dependencies.py UV [IGNORED]. Runs pip-audit over the export of the lock for the centre and
for a hospital's node. A finding fails, unless IGNORED (scripts/ignored_advisories.txt) explains it. What the database
did not answer for was not audited: pip-audit only skips it, so this says it, and fails with STRICT=1.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PIP_AUDIT = "pip-audit==2.10.1"
EXTRAS = {
    "centre": ("registry", "coordinator", "aggregator", "audit", "deployment", "otlp"),
    "hospital-node": ("hospital-node", "otlp"),
}


def read_ignored(path: Path) -> dict[str, str]:
    """Advisory and reason of each line `ID reason`. Exits when a reason is missing."""
    ignored: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        advisory, _, reason = line.strip().partition(" ")
        if not reason.strip():
            sys.exit(f"{path}: {advisory} is ignored without a reason")
        ignored[advisory] = reason.strip()
    return ignored


def export(uv: str, extras: tuple[str, ...], out: Path) -> None:
    """Write the locked packages of these extras as a requirements file with hashes."""
    chosen = [argument for extra in extras for argument in ("--extra", extra)]
    command = [uv, "export", "--quiet", "--locked", "--no-default-groups", "--no-emit-project", *chosen, "-o", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603 - no shell


def audit(uv: str, requirements: Path) -> list[dict[str, object]]:
    """Every package with its advisories (`vulns`), or why it was not audited (`skip_reason`); none: no answer."""
    tool = [uv, "tool", "run", "--quiet", "--python", "3.11", "--from", PIP_AUDIT, "pip-audit"]
    how = ["--disable-pip", "--require-hashes", "--progress-spinner", "off", "--format", "json"]
    done = subprocess.run(  # noqa: S603 - no shell
        [*tool, *how, "--requirement", str(requirements)], capture_output=True, text=True, check=False
    )
    try:
        found: list[dict[str, object]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        print("\n".join(done.stderr.strip().splitlines()[-3:]), file=sys.stderr)
        return []
    return found


def judge(name: str, packages: list[dict[str, object]], ignored: dict[str, str]) -> tuple[int, bool]:
    """Print what was found. Returns how many findings are not explained, and whether every package was audited."""
    unexplained = 0
    skipped = [str(package["name"]) for package in packages if "skip_reason" in package]
    for package in packages:
        vulns = package.get("vulns", [])
        assert isinstance(vulns, list)
        for vuln in vulns:
            names = {vuln["id"], *vuln.get("aliases", [])}
            reason = next((ignored[known] for known in sorted(names) if known in ignored), None)
            fixed = ", ".join(vuln.get("fix_versions", [])) or "no version"
            what = f"{name}: {package['name']} {package['version']}: {vuln['id']}, fixed in {fixed}"
            print(f"{what} (ignored: {reason})" if reason else f"FOUND {what}")
            unexplained += reason is None
    audited = len(packages) - len(skipped)
    print(f"{name}: {audited} of {len(packages)} packages audited, {unexplained} unexplained findings")
    if not audited:
        print(f"NOT AUDITED {name}: the advisory database did not answer for any package")
    elif skipped:
        print(f"NOT AUDITED {name}: {', '.join(skipped)}")
    return unexplained, bool(packages) and not skipped


def main() -> None:
    uv = sys.argv[1]
    here = Path(__file__).parent
    ignored = read_ignored(Path(sys.argv[2]) if len(sys.argv) > 2 else here / "ignored_advisories.txt")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name, extras in EXTRAS.items():
            requirements = Path(folder) / f"{name}.txt"
            export(uv, extras, requirements)
            results.append(judge(name, audit(uv, requirements), ignored))
    if any(unexplained for unexplained, _ in results):
        sys.exit("known weaknesses: raise the version in uv.lock, or explain them in scripts/ignored_advisories.txt")
    if not all(whole for _, whole in results) and os.environ.get("STRICT") == "1":
        sys.exit("STRICT=1: not everything was audited")


if __name__ == "__main__":
    main()
