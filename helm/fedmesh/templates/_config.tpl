{{/* Configuration file of a service. Takes root and name. */}}
{{- define "fedmesh.config" -}}
{{- $root := .root -}}
{{- $values := $root.Values -}}
{{- $service := index $values.services .name -}}
{{- $config := dict -}}
{{- $_ := set $config "server" (dict
      "listen" (printf "0.0.0.0:%v" $values.ports.grpc)
      "health_listen" (printf "0.0.0.0:%v" $values.ports.health)
      "metrics_listen" (printf "0.0.0.0:%v" $values.ports.metrics)
      "tls" (fromYaml (include "fedmesh.tlsFiles" .))
      "drain_s" $values.drain.callsSeconds
      "limits" (fromYaml (include "fedmesh.limits" $root))
      "refusals" (dict "directory" "/var/lib/fedmesh/refusals")) -}}
{{- if $values.people.enabled -}}
{{- $_ := set $config.server "people" (fromYaml (include "fedmesh.people" $root)) -}}
{{- end -}}
{{- $telemetry := dict "log_level" $values.telemetry.logLevel "trace_calls" $values.telemetry.traceCalls -}}
{{- with $values.telemetry.otlpEndpoint -}}{{- $_ := set $telemetry "otlp_endpoint" . -}}{{- end -}}
{{- $_ := set $config "telemetry" $telemetry -}}
{{- if eq (include "fedmesh.store" .name) "postgres" -}}
{{- $_ := set $config "postgres" (fromYaml (include "fedmesh.postgresSection" .)) -}}
{{- else -}}
{{- $_ := set $config "redis" (fromYaml (include "fedmesh.redisSection" .)) -}}
{{- end -}}
{{- if has (printf "%s-key" .name) (splitList "," (include "fedmesh.signingKeys" $root)) -}}
{{- $_ := set $config "signing_key" (printf "/etc/fedmesh/signing/%s.key" .name) -}}
{{- end -}}
{{- if and (eq .name "registry") $values.enrolment.enabled -}}
{{- $_ := set $config "enrolment" (fromYaml (include "fedmesh.enrolment" $root)) -}}
{{- end -}}
{{- range compact (splitList "," (include "fedmesh.callees" .name)) -}}
{{- $_ := set $config . (dict "target" (include "fedmesh.target" (dict "root" $root "host" .))) -}}
{{- end -}}
{{- if and (eq .name "coordinator") $values.ports.ops -}}
{{- $_ := set $config "ops_listen" (printf "127.0.0.1:%v" $values.ports.ops) -}}
{{- end -}}
{{- toYaml (mergeOverwrite $config (deepCopy $service.settings)) -}}
{{- end -}}

{{- define "fedmesh.limits" -}}
calls: {{ .Values.limits.calls }}
calls_of_one: {{ .Values.limits.callsOfOne }}
calls_per_s_of_one: {{ .Values.limits.callsPerSecondOfOne }}
burst_of_one: {{ .Values.limits.burstOfOne }}
connections: {{ .Values.limits.connections }}
metadata_bytes: {{ .Values.limits.metadataBytes }}
handshake_s: {{ .Values.limits.handshakeS }}
message_s: {{ .Values.limits.messageS }}
{{- end -}}

{{/* How people sign in. Issuers on loopback, which are for development, cannot be allowed here. */}}
{{- define "fedmesh.people" -}}
{{- $people := .Values.people -}}
issuer: {{ $people.issuer | quote }}
audience: {{ $people.audience | quote }}
{{- with $people.jwksUrl }}
jwks_url: {{ . | quote }}
{{- end }}
{{- if $people.caConfigMap.name }}
ca: /etc/fedmesh/issuer-ca/ca.crt
{{- end }}
algorithms: {{ toJson $people.algorithms }}
role_claim: {{ $people.roleClaim | quote }}
roles: {{ toJson $people.roles }}
mfa: {{ toJson $people.mfa }}
leeway_s: {{ $people.leewayS }}
max_age_s: {{ $people.maxAgeS }}
keys_fresh_s: {{ $people.keysFreshS }}
keys_stale_s: {{ $people.keysStaleS }}
{{- end -}}

{{- define "fedmesh.enrolment" -}}
{{- $enrolment := .Values.enrolment -}}
listen: 0.0.0.0:{{ .Values.ports.enrolment }}
ca_certificate: /etc/fedmesh/issuing/tls.crt
ca_key: /etc/fedmesh/issuing/tls.key
lifetime_s: {{ $enrolment.lifetimeS }}
backdate_s: {{ $enrolment.backdateS }}
per_minute: {{ $enrolment.perMinute }}
burst: {{ $enrolment.burst }}
all_per_minute: {{ $enrolment.allPerMinute }}
{{- end -}}

{{- define "fedmesh.tlsFiles" -}}
ca: /etc/fedmesh/tls/ca.crt
certificate: /etc/fedmesh/tls/tls.crt
key: /etc/fedmesh/tls/tls.key
{{- end -}}

{{- define "fedmesh.postgresSection" -}}
dsn: {{ include "fedmesh.dsn" (dict "root" .root "user" (printf "%s_service" .name) "database" .root.Values.postgres.database) | quote }}
password_file: /etc/fedmesh/store/password
{{- end -}}

{{- define "fedmesh.redisSection" -}}
{{- $valkey := .root.Values.valkey -}}
{{- if eq $valkey.mode "external" }}
url: {{ required "valkey.external.url: name your Redis, or choose another valkey.mode" $valkey.external.url | quote }}
{{- else if eq $valkey.mode "sentinel" }}
url: rediss://{{ include "fedmesh.host" (dict "root" .root "host" "valkey") }}:6379/0?ssl_ca_certs=/etc/fedmesh/valkey-ca/ca.crt
{{- else }}
url: redis://{{ include "fedmesh.host" (dict "root" .root "host" "valkey") }}:6379/0
{{- end }}
username: {{ .name }}
password_file: /etc/fedmesh/store/password
{{- if and (eq $valkey.mode "external") $valkey.external.sentinels }}
sentinel:
  addresses: {{- toYaml $valkey.external.sentinels | nindent 4 }}
  master: {{ $valkey.external.sentinelMaster }}
{{- else if eq $valkey.mode "sentinel" }}
sentinel:
  addresses:
    {{- range $number := list 0 1 2 }}
    - {{ include "fedmesh.valkeyPod" (dict "root" $.root "number" $number) }}:26379
    {{- end }}
  master: fedmesh
{{- end }}
{{- end -}}

{{/* Configuration of the database Job. */}}
{{- define "fedmesh.databaseConfig" -}}
{{- $external := eq .Values.postgres.mode "external" -}}
{{- $user := ternary .Values.postgres.external.adminUser "postgres" $external -}}
{{- $database := ternary .Values.postgres.external.adminDatabase "postgres" $external -}}
admin:
  dsn: {{ include "fedmesh.dsn" (dict "root" . "user" $user "database" $database) | quote }}
  password_file: /etc/fedmesh/admin/password
database: {{ .Values.postgres.database }}
passwords:
  {{- range list "registry_migrator" "registry_service" "audit_migrator" "audit_service" }}
  {{ . }}: /etc/fedmesh/roles/{{ . | replace "_" "-" }}/password
  {{- end }}
patience_s: {{ .Values.jobs.patienceSeconds }}
{{- end -}}

{{/* Configuration of the check by `helm test`. */}}
{{- define "fedmesh.checkConfig" -}}
tls: {{- include "fedmesh.tlsFiles" . | nindent 2 }}
services:
  {{- range $name, $_ := .Values.services }}
  {{ $name }}:
    target: {{ include "fedmesh.target" (dict "root" $ "host" $name) }}
    service: {{ include "fedmesh.grpcService" $name }}
  {{- end }}
telemetry: {log_level: warning}
{{- end -}}
