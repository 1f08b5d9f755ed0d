#!/usr/bin/env bash
# buf breaking (WIRE_JSON) against the newest commit that has protos. Usage: scripts/check_proto_breaking.sh BUF
set -euo pipefail
cd "$(dirname "$0")/.."
buf=$1
if ! git cat-file -e HEAD:proto/buf.yaml 2>/dev/null; then
  echo "buf breaking: no committed protos yet"
  exit 0
fi
base=$(mktemp -d)
trap 'rm -rf "$base"' EXIT
# The commit before the working tree: the parent when nothing is changed, HEAD otherwise.
rev=HEAD
if git diff --quiet HEAD -- proto/fedmesh && git cat-file -e HEAD~1:proto/buf.yaml 2>/dev/null; then rev=HEAD~1; fi
git archive "$rev" proto | tar -x -C "$base"
cd proto && "$buf" breaking --against "$base/proto"
echo "buf breaking: compatible with $(git rev-parse --short "$rev")"
