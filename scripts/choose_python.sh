#!/bin/sh
# Prints the Python 3.11 for .venv: what UV_PYTHON says, else of those on PATH the first that is no program around a shared
# libpython, else 3.11, which uv looks for. One with a shared libpython takes a quarter more processor time for all we do.
set -eu

if [ -n "${UV_PYTHON:-}" ]; then
  echo "$UV_PYTHON"
  exit
fi
IFS=:
for folder in $PATH; do
  if [ -x "$folder/python3.11" ] && "$folder/python3.11" -I -c '
import ctypes, lzma, sqlite3, ssl, sys
sys.exit(sys.version_info[:2] != (3, 11) or "libpython" in open("/proc/self/maps").read())
' 2>/dev/null; then
    echo "$folder/python3.11"
    exit
  fi
done
echo 3.11
