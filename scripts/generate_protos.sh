#!/usr/bin/env bash
# Regenerates proto/gen from proto/fedmesh. Usage: scripts/generate_protos.sh [OUT]  (default: proto/gen)
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-proto/gen}
mkdir -p "$out"
find "$out" -name '*_pb2*' -delete
mapfile -t protos < <(cd proto && find fedmesh -name '*.proto' | sort)
python -m grpc_tools.protoc -I proto --python_out="$out" --grpc_python_out="$out" \
  --mypy_out="$out" --mypy_grpc_out="$out" "${protos[@]}"
find "$out/fedmesh" -type d -exec touch {}/__init__.py \;
