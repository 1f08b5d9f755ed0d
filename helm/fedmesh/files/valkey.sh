#!/bin/sh
# One Valkey, or Redis >= 7, from whatever image has its programs. Usage: valkey.sh run | ready
set -eu

etc=${FEDMESH_ETC:-/etc/fedmesh}
data=${FEDMESH_DATA:-/var/lib/fedmesh}
run=${FEDMESH_RUN:-/run}

program() {
  command -v "valkey-$1" || command -v "redis-$1" || { echo "no valkey-$1 or redis-$1 in this image" >&2; exit 1; }
}

password() {
  cat "$etc/accounts/$1/password"
}

digest() {
  printf '%s' "$(password "$1")" | sha256sum | cut -d ' ' -f 1
}

# The server gets digests of passwords, never the passwords.
users() {
  echo "user default off resetpass resetkeys resetchannels -@all"
  echo "user admin on #$(digest admin) ~* &* +@all"
  for user in coordinator aggregator; do
    echo "user $user on #$(digest "$user") resetchannels ~$user:* &$user:* $(cat "$etc/valkey/service-commands")"
  done
}

run() {
  server=$(program server)
  users > "$run/valkey/users.acl"
  exec "$server" \
    --dir "$data/valkey" \
    --port "${PORT:-6379}" \
    --protected-mode no \
    --aclfile "$run/valkey/users.acl" \
    --appendonly yes \
    --appendfsync everysec \
    --save "" \
    --maxmemory "$MAX_MEMORY" \
    --maxmemory-policy noeviction
}

ready() {
  client=$(program cli)
  REDISCLI_AUTH=$(password admin)
  VALKEYCLI_AUTH=$REDISCLI_AUTH
  export REDISCLI_AUTH VALKEYCLI_AUTH
  [ "$("$client" -h 127.0.0.1 -p "${PORT:-6379}" --user admin ping)" = PONG ]
}

case "$1" in
  run) run ;;
  ready) ready ;;
  *) echo "usage: valkey.sh run | ready" >&2; exit 64 ;;
esac
