#!/bin/sh
# One PostgreSQL from whatever image has its programs. Usage: postgres.sh run | ready | stop
set -eu

etc=${FEDMESH_ETC:-/etc/fedmesh}
data=${FEDMESH_DATA:-/var/lib/fedmesh}
run=${FEDMESH_RUN:-/run}

programs() {
  for folder in "$(dirname "$(command -v initdb 2>/dev/null || echo /none/initdb)")" /usr/lib/postgresql/*/bin /usr/local/pgsql/bin; do
    if [ -x "$folder/initdb" ] && [ -x "$folder/postgres" ]; then
      echo "$folder"
      return
    fi
  done
  echo "no initdb and postgres in this image" >&2
  exit 1
}

bin=$(programs)
export PATH="$bin:$PATH"
cluster=$data/postgres/cluster

run() {
  if [ ! -s "$cluster/PG_VERSION" ]; then
    # Made beside and then renamed: whatever cuts this short leaves no half cluster.
    rm -rf "$cluster.new"
    # A container may use no huge pages, whatever the node has: PostgreSQL, which tries them, would die of SIGBUS.
    pages=
    if initdb --help | grep -q -- '--set'; then pages=--set=huge_pages=off; fi
    # shellcheck disable=SC2086 - one option or none
    initdb $pages --pgdata="$cluster.new" --username=postgres --pwfile="$etc/admin/password" \
      --auth=scram-sha-256 --encoding=UTF8 --locale=C --data-checksums
    mv "$cluster.new" "$cluster"
  fi
  # A volume that was mounted with a group gives the group access, which PostgreSQL refuses.
  chmod 0700 "$cluster"
  exec postgres -D "$cluster" \
    -c listen_addresses='*' \
    -c port="${PORT:-5432}" \
    -c unix_socket_directories="$run/postgresql" \
    -c hba_file="$etc/postgres/pg_hba.conf" \
    -c password_encryption=scram-sha-256 \
    -c max_connections="${MAX_CONNECTIONS}" \
    -c shared_buffers=128MB \
    -c huge_pages=off \
    -c log_destination=stderr \
    -c logging_collector=off
}

case "$1" in
  run) run ;;
  ready) exec pg_isready --quiet --host="$run/postgresql" --port="${PORT:-5432}" --username=postgres ;;
  # Fast shutdown: SIGTERM alone would wait for every client to leave.
  stop) exec pg_ctl stop --pgdata="$cluster" --mode=fast --wait --timeout=60 ;;
  *) echo "usage: postgres.sh run | ready | stop" >&2; exit 64 ;;
esac
