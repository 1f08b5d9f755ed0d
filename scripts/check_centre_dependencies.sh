#!/usr/bin/env bash
# Installs the extras of the four control-plane services into an empty environment, refuses TensorFlow there, starts each
# service's --help from it, and prints the size. Usage: scripts/check_centre_dependencies.sh UV
set -euo pipefail
cd "$(dirname "$0")/.."
uv=$1
limit_mb=400
env=.cache/centre-env
rm -rf "$env"
UV_PROJECT_ENVIRONMENT=$env "$uv" sync --quiet --locked --no-default-groups --python 3.11 \
  --extra registry --extra coordinator --extra aggregator --extra audit --extra deployment
if ls "$env"/lib/python*/site-packages | grep -qiE '^(tensorflow|tensorflow_federated|jax|keras)'; then
  echo "the control plane's environment contains TensorFlow"
  exit 1
fi
for service in registry coordinator aggregator audit deployment; do
  "$env/bin/python" -m "services.$service" --help >/dev/null
done
size=$(du -sm "$env" | cut -f1)
echo "control plane: ${size} MB without TensorFlow (limit ${limit_mb} MB)"
test "$size" -lt "$limit_mb"
