#!/usr/bin/env bash
# Writes a CycloneDX bill of materials for each image, from uv.lock: name, version, hashes of every Python package in it.
# The operating system's packages come with the base image, and are in that image's own bill.
# Usage: scripts/make_sbom.sh UV FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
uv=$1
out=$2
mkdir -p "$out"
for image in registry coordinator aggregator audit deployment hospital-node; do
  extras=(--extra "$image")
  # As the Dockerfile installs them.
  if [ "$image" != deployment ]; then extras+=(--extra otlp); fi
  requirements=$(mktemp)
  "$uv" export --quiet --locked --no-default-groups --no-emit-project "${extras[@]}" -o "$requirements" >/dev/null
  # Flat, as the lock is exported: it warns that it knows no graph. Validating as many hashes takes it minutes.
  PYTHONWARNINGS=ignore "$uv" tool run --quiet --python 3.11 --from cyclonedx-bom==7.5.0 cyclonedx-py requirements "$requirements" \
    --pyproject pyproject.toml --mc-type application --spec-version 1.6 --output-reproducible --no-validate \
    --output-format JSON --output-file "$out/fedmesh-$image.cdx.json" \
    2> >(grep -v "Validation skipped" >&2 || true)
  rm -f "$requirements"
  echo "$out/fedmesh-$image.cdx.json: $(grep -c '"purl"' "$out/fedmesh-$image.cdx.json") packages"
done
