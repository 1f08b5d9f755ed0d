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
      "drain_s" $values.drain.callsSeconds) -}}
{{- $telemetry := dict "log_level" $values.telemetry.logLevel "trace_calls" $values.telemetry.traceCalls -}}
{{- with $values.telemetry.otlpEndpoint -}}{{- $_ := set $telemetry "otlp_endpoint" . -}}{{- end -}}
{{- $_ := set $config "telemetry" $telemetry -}}
{{- if eq (include "fedmesh.store" .name) "postgres" -}}
{{- $_ := set $config "postgres" (fromYaml (include "fedmesh.postgresSection" .)) -}}
{{- else -}}
{{- $_ := set $config "redis" (fromYaml (include "fedmesh.redisSection" .)) -}}
{{- end -}}
{{- if eq .name "audit" -}}{{- $_ := set $config "signing_key" "/etc/fedmesh/signing/audit.key" -}}{{- end -}}
{{- range compact (splitList "," (include "fedmesh.callees" .name)) -}}
{{- $_ := set $config . (dict "target" (include "fedmesh.target" (dict "root" $root "host" .))) -}}
{{- end -}}
{{- if and (eq .name "coordinator") $values.ports.ops -}}
{{- $_ := set $config "ops_listen" (printf "127.0.0.1:%v" $values.ports.ops) -}}
{{- end -}}
{{- toYaml (mergeOverwrite $config (deepCopy $service.settings)) -}}
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
