#!/bin/sh
# Valkey, or Redis >= 7, and its Sentinel from whatever image has their programs.
# Usage: valkey.sh run | ready | sentinel | sentinel-ready | sentinel-alive
set -eu
umask 077

etc=${FEDMESH_ETC:-/etc/fedmesh}
data=${FEDMESH_DATA:-/var/lib/fedmesh}/valkey
run=${FEDMESH_RUN:-/run}/valkey
port=${PORT:-6379}
sentinel_port=${SENTINEL_PORT:-26379}
# With Sentinels: host:port of each, of this server's own host, and of the first master.
sentinels=${SENTINELS:-}
me=${ME:-}
first=${FIRST:-}
tls=${TLS:-}

program() {
  command -v "valkey-$1" || command -v "redis-$1" || { echo "no valkey-$1 or redis-$1 in this image" >&2; exit 1; }
}

password() {
  cat "$etc/accounts/$1/password"
}

digest() {
  printf '%s' "$(password "$1")" | sha256sum | cut -d ' ' -f 1
}

# The server gets digests of passwords, never the passwords. $1: rules of the services, where SELF is the user's name.
users() {
  # Nobody can sign in as `default`: it is off. But a server replays the transactions of its own log with this user's
  # rights, and silently leaves out what those do not allow (valkey-io/valkey#3983).
  echo "user default off resetpass allkeys allchannels +@all"
  echo "user admin on #$(digest admin) ~* &* +@all"
  for user in coordinator aggregator; do
    echo "user $user on #$(digest "$user") $1" | sed "s/SELF/$user/g"
  done
}

listen() {
  if [ -z "$tls" ]; then
    echo "port $1"
    return
  fi
  echo "port 0"
  echo "tls-port $1"
  echo "tls-cert-file $etc/tls/tls.crt"
  echo "tls-key-file $etc/tls/tls.key"
  echo "tls-ca-cert-file $etc/tls/ca.crt"
  echo "tls-auth-clients no"
  echo "tls-replication yes"
}

# A call as admin: HOST PORT COMMAND...
ask() {
  client=$(program cli)
  REDISCLI_AUTH=$(password admin)
  VALKEYCLI_AUTH=$REDISCLI_AUTH
  export REDISCLI_AUTH VALKEYCLI_AUTH
  host=$1
  to=$2
  shift 2
  # A machine that is gone says nothing for minutes, and its address is known for as long.
  # shellcheck disable=SC2086 - two options or none
  timeout 3 "$client" ${tls:+--tls --cacert "$etc/tls/ca.crt"} -h "$host" -p "$to" --user admin "$@"
}

# "HOST PORT" of the master: as a Sentinel says; if none answers, as the one of this pod last knew; else the first.
master() {
  for _ in 1 2 3 4 5 6 7 8 9 10; do
    for watcher in $sentinels; do
      answer=$(ask "${watcher%:*}" "${watcher##*:}" sentinel get-master-addr-by-name fedmesh 2>/dev/null | tr '\n' ' ') || continue
      case "$answer" in
        *" "[0-9]*) echo "$answer"; return ;;
      esac
    done
    sleep 2
  done
  known=$(sed -n 's/^sentinel monitor fedmesh \([^ ]*\) \([0-9]*\) .*/\1 \2/p' "$data/sentinel.conf" 2>/dev/null || true)
  echo "${known:-${first%:*} ${first##*:}}"
}

run() {
  server=$(program server)
  users "resetchannels ~SELF:* &SELF:* $(cat "$etc/valkey/service-commands")" > "$run/users.acl"
  {
    listen "$port"
    echo "dir $data"
    echo "protected-mode no"
    echo "aclfile $run/users.acl"
    echo "appendonly yes"
    echo "appendfsync everysec"
    echo 'save ""'
    echo "maxmemory $MAX_MEMORY"
    echo "maxmemory-policy noeviction"
    if [ -n "$sentinels" ]; then
      echo "masteruser admin"
      echo "masterauth $(password admin)"
      echo "replica-announce-ip $me"
      echo "replica-announce-port $port"
      found=$(master)
      # shellcheck disable=SC2086 - host and port
      set -- $found
      [ "$1:$2" = "$me:$port" ] || echo "replicaof $1 $2"
    fi
  } > "$run/valkey.conf"
  exec "$server" "$run/valkey.conf"
}

ready() {
  # A renewed certificate is read when it is set again.
  if [ -n "$tls" ] && [ "$etc/tls/tls.crt" -nt "$run/valkey.conf" ]; then
    ask 127.0.0.1 "$port" config set tls-cert-file "$etc/tls/tls.crt" tls-key-file "$etc/tls/tls.key" > /dev/null
    touch "$run/valkey.conf"
  fi
  [ "$(ask 127.0.0.1 "$port" ping)" = PONG ]
}

sentinel() {
  server=$(program server)
  commands="-@all +auth +hello +ping +sentinel|masters +sentinel|master +sentinel|get-master-addr-by-name +sentinel|replicas"
  users "resetchannels $commands" > "$run/sentinel.acl"
  state=$(grep -E '^sentinel (monitor|myid|config-epoch|leader-epoch|current-epoch|known-replica|known-sentinel) ' \
    "$data/sentinel.conf" 2>/dev/null || echo "sentinel monitor fedmesh ${first%:*} ${first##*:} 2")
  {
    listen "$sentinel_port"
    echo "dir $run"
    echo "protected-mode no"
    echo "aclfile $run/sentinel.acl"
    echo "sentinel resolve-hostnames yes"
    echo "sentinel announce-hostnames yes"
    echo "sentinel announce-ip $me"
    echo "sentinel announce-port $sentinel_port"
    echo "sentinel sentinel-user admin"
    echo "sentinel sentinel-pass $(password admin)"
    echo "$state"
    echo "sentinel auth-user fedmesh admin"
    echo "sentinel auth-pass fedmesh $(password admin)"
    echo "sentinel down-after-milliseconds fedmesh ${DOWN_AFTER_MS:-2000}"
    echo "sentinel failover-timeout fedmesh ${FAILOVER_MS:-10000}"
  } > "$data/sentinel.conf.new"
  mv "$data/sentinel.conf.new" "$data/sentinel.conf"
  touch "$run/sentinel.started"
  exec "$server" "$data/sentinel.conf" --sentinel
}

sentinel_ready() {
  [ "$(ask 127.0.0.1 "$sentinel_port" ping)" = PONG ]
}

# A Sentinel cannot read a renewed certificate: it is started again, which takes a second.
sentinel_alive() {
  if [ -n "$tls" ] && [ "$etc/tls/tls.crt" -nt "$run/sentinel.started" ]; then
    exit 1
  fi
  sentinel_ready
}

case "${1:-}" in
  run) run ;;
  ready) ready ;;
  sentinel) sentinel ;;
  sentinel-ready) sentinel_ready ;;
  sentinel-alive) sentinel_alive ;;
  *) echo "usage: valkey.sh run | ready | sentinel | sentinel-ready | sentinel-alive" >&2; exit 64 ;;
esac
