#!/usr/bin/env bash
# Puts promtool, prometheus and amtool of Debian into .tools/prometheus, without root, unless they are on PATH. Usage:
# scripts/fetch_prometheus.sh
set -euo pipefail
cd "$(dirname "$0")/.."
folder=.tools/prometheus

for program in promtool prometheus amtool; do
  command -v "$program" >/dev/null || [ -x "$folder/usr/bin/$program" ] || missing=yes
done
[ "${missing:-no}" = yes ] || exit 0
if ! command -v apt-get >/dev/null || ! command -v dpkg >/dev/null; then
  echo "promtool, prometheus and amtool are missing: install Prometheus and Alertmanager, or run this on Debian" >&2
  exit 1
fi
echo "Fetching Debian's prometheus and prometheus-alertmanager into $folder ..."
state=$(mktemp -d)
trap 'rm -rf "$state"' EXIT
mkdir -p "$state/lists/partial" "$state/cache/archives/partial" "$folder"
# Lists of one's own, since those of the system are root's.
apt=(apt-get -qq -o "Dir::State::lists=$state/lists" -o "Dir::Cache=$state/cache" -o APT::Sandbox::User=)
"${apt[@]}" update
(cd "$state" && "${apt[@]}" download prometheus prometheus-alertmanager)
for package in "$state"/*.deb; do dpkg -x "$package" "$folder"; done
"$folder/usr/bin/promtool" --version | head -1
