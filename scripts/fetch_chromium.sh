#!/usr/bin/env bash
# Installs Debian's Chromium where there is none, as root; else it says what is missing. Usage: scripts/fetch_chromium.sh
set -euo pipefail
command -v chromium >/dev/null && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "chromium is missing: as root on Debian, apt-get install --no-install-recommends chromium fonts-dejavu-core" >&2
  exit 1
fi
echo "Installing Debian's chromium by apt-get ..."
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
# Without a font of its own the page would be shown in boxes.
apt-get -qq install -y --no-install-recommends chromium fonts-dejavu-core >/dev/null
chromium --version
