{{- define "fedmesh.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What selects pods: never changes between versions. Takes root and component. */}}
{{- define "fedmesh.selectorLabels" -}}
app.kubernetes.io/name: fedmesh
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* Labels of pods: what never changes, so that another version of the chart alone restarts nothing. */}}
{{- define "fedmesh.podLabels" -}}
{{ include "fedmesh.selectorLabels" . }}
app.kubernetes.io/part-of: fedmesh
{{- end -}}

{{- define "fedmesh.labels" -}}
{{ include "fedmesh.selectorLabels" . }}
app.kubernetes.io/part-of: fedmesh
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{/* A host name in full. Takes root and host. */}}
{{- define "fedmesh.host" -}}
{{ include "fedmesh.fullname" .root }}-{{ .host }}.{{ .root.Release.Namespace }}.svc.{{ .root.Values.clusterDomain }}
{{- end -}}

{{/* gRPC target of a service: every pod's address, so that clients spread their calls. */}}
{{- define "fedmesh.target" -}}
dns:///{{ include "fedmesh.host" . }}:{{ .root.Values.ports.grpc }}
{{- end -}}

{{- define "fedmesh.secret" -}}
{{ index .root.Values.secretNames .key | default (printf "%s-%s" (include "fedmesh.fullname" .root) .key) }}
{{- end -}}

{{/* Reference of an image. Takes root, image (repository, tag, digest) and name. */}}
{{- define "fedmesh.image" -}}
{{- $repository := .image.repository | default (printf "%s-%s" .root.Values.image.repository .name) -}}
{{- if .image.digest -}}
{{ $repository }}@{{ .image.digest }}
{{- else -}}
{{ $repository }}:{{ .image.tag | default .root.Values.image.tag | default .root.Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "fedmesh.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* What all pods of the chart have in common. Takes root and account. */}}
{{- define "fedmesh.podCommon" -}}
serviceAccountName: {{ include "fedmesh.fullname" .root }}-{{ .account }}
automountServiceAccountToken: false
enableServiceLinks: false
# Names here are whole. Tried first with the search domains of the node, they would hang where no name server answers for those.
dnsConfig: {options: [{name: ndots, value: "1"}]}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{/* Pod security of a store, whose image has a user of its own. Takes root and uid. */}}
{{- define "fedmesh.storeSecurity" -}}
{{- toYaml (merge (dict "runAsUser" (int .uid) "runAsGroup" (int .uid) "fsGroup" (int .uid)) (deepCopy .root.Values.podSecurityContext)) -}}
{{- end -}}

{{/* Environment of fedmesh's own processes. */}}
{{- define "fedmesh.env" -}}
- {name: HOME, value: /tmp}
- {name: TMPDIR, value: /tmp}
- {name: PYTHONUNBUFFERED, value: "1"}
- {name: OMP_NUM_THREADS, value: "1"}
- {name: MALLOC_ARENA_MAX, value: "2"}
{{- end -}}

{{/* The file of a Secret's keys, readable by the pod's group only. Takes name, secret and keys. */}}
{{- define "fedmesh.secretVolume" -}}
- name: {{ .name }}
  secret:
    secretName: {{ .secret }}
    defaultMode: 0440
    items:
      {{- range .keys }}
      - {key: {{ . }}, path: {{ . }}}
      {{- end }}
{{- end -}}

{{- define "fedmesh.postgresHost" -}}
{{- if eq .Values.postgres.mode "external" -}}
{{ required "postgres.external.host: name your PostgreSQL, or choose another postgres.mode" .Values.postgres.external.host }}
{{- else if eq .Values.postgres.mode "cloudNativePG" -}}
{{ include "fedmesh.host" (dict "root" . "host" "postgres-rw") }}
{{- else -}}
{{ include "fedmesh.host" (dict "root" . "host" "postgres") }}
{{- end -}}
{{- end -}}

{{- define "fedmesh.postgresPort" -}}
{{ if eq .Values.postgres.mode "external" }}{{ .Values.postgres.external.port }}{{ else }}5432{{ end }}
{{- end -}}

{{- define "fedmesh.postgresVerifies" -}}
{{ if has .Values.postgres.sslmode (list "verify-ca" "verify-full") }}yes{{ end }}
{{- end -}}

{{/* libpq connection string without a password. Takes root, user and database. */}}
{{- define "fedmesh.dsn" -}}
host={{ include "fedmesh.postgresHost" .root }} port={{ include "fedmesh.postgresPort" .root }} dbname={{ .database }} user={{ .user }} sslmode={{ .root.Values.postgres.sslmode }}
{{- if include "fedmesh.postgresVerifies" .root }} sslrootcert=/etc/fedmesh/postgres-ca/ca.crt{{ end }} target_session_attrs=read-write
{{- end -}}

{{- define "fedmesh.postgresCaVolume" -}}
{{- if include "fedmesh.postgresVerifies" . }}
- name: postgres-ca
  secret:
    {{- if eq .Values.postgres.mode "cloudNativePG" }}
    secretName: {{ .Values.postgres.caSecret.name | default (printf "%s-postgres-ca" (include "fedmesh.fullname" .)) }}
    {{- else }}
    secretName: {{ required "postgres.caSecret.name: name the Secret with the CA of your PostgreSQL" .Values.postgres.caSecret.name }}
    {{- end }}
    defaultMode: 0440
    items: [{key: {{ .Values.postgres.caSecret.key }}, path: ca.crt}]
{{- end }}
{{- end -}}

{{/* Secret of PostgreSQL's superuser, which only the database Job gets. */}}
{{- define "fedmesh.postgresAdminSecret" -}}
{{- if and (eq .Values.postgres.mode "cloudNativePG") (not (index .Values.secretNames "postgres-admin")) -}}
{{ include "fedmesh.fullname" . }}-postgres-superuser
{{- else -}}
{{ include "fedmesh.secret" (dict "root" . "key" "postgres-admin") }}
{{- end -}}
{{- end -}}

{{/* What uses what: the edges of the graph of services, one word each. */}}
{{- define "fedmesh.callees" -}}
{{- $graph := dict "registry" (list "audit") "coordinator" (list "registry" "aggregator") "aggregator" (list "registry") "audit" (list "registry") -}}
{{- index $graph . | join "," -}}
{{- end -}}

{{- define "fedmesh.store" -}}
{{ if has . (list "registry" "audit") }}postgres{{ else }}valkey{{ end }}
{{- end -}}

{{- define "fedmesh.grpcService" -}}
fedmesh.{{ . }}.v1.{{ title . }}Service
{{- end -}}

{{- define "fedmesh.graceSeconds" -}}
{{ add .Values.drain.sleepSeconds .Values.drain.callsSeconds .Values.drain.marginSeconds }}
{{- end -}}

{{/* Secret with the CA of Valkey or Redis, when it speaks TLS. */}}
{{- define "fedmesh.valkeyCaSecret" -}}
{{- if eq .Values.valkey.mode "external" -}}
{{ .Values.valkey.external.caSecret.name }}
{{- else if eq .Values.valkey.mode "sentinel" -}}
{{ include "fedmesh.secret" (dict "root" . "key" "valkey-tls") }}
{{- end -}}
{{- end -}}

{{/* All host names of a service, as a YAML list. Takes root and host. */}}
{{- define "fedmesh.dnsNames" -}}
- {{ include "fedmesh.host" . }}
- {{ include "fedmesh.fullname" .root }}-{{ .host }}-entry.{{ .root.Release.Namespace }}.svc.{{ .root.Values.clusterDomain }}
- localhost
{{- with index .root.Values.external.hosts .host }}
- {{ . }}
{{- end }}
{{- if and (eq .host "registry") .root.Values.enrolment.enabled }}
{{- with .root.Values.external.hosts.enrolment }}
- {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Accounts of the stores that are ours to make. */}}
{{- define "fedmesh.generatedAccounts" -}}
{{- $accounts := list "postgres-registry-migrator" "postgres-registry-service" "postgres-audit-migrator" "postgres-audit-service" "valkey-coordinator" "valkey-aggregator" -}}
{{- if eq .Values.postgres.mode "single" }}{{ $accounts = append $accounts "postgres-admin" }}{{ end -}}
{{- if ne .Values.valkey.mode "external" }}{{ $accounts = append $accounts "valkey-admin" }}{{ end -}}
{{- join "," $accounts -}}
{{- end -}}

{{/* Secrets of the keys that services sign with. */}}
{{- define "fedmesh.signingKeys" -}}
audit-key{{ if .Values.registryKey.enabled }},registry-key{{ end }}
{{- end -}}

{{/* Secret of the authority that signs hospitals' certificates: in a trial with generated certificates, that of them all. */}}
{{- define "fedmesh.issuingSecret" -}}
{{- include "fedmesh.secret" (dict "root" . "key" (ternary "authority" "issuing-authority" (eq .Values.tls.mode "generated"))) -}}
{{- end -}}

{{/* User name of an account: postgres-registry-service is registry_service, valkey-admin is admin. */}}
{{- define "fedmesh.username" -}}
{{- if eq . "postgres-admin" -}}postgres
{{- else -}}{{ . | trimPrefix "postgres-" | trimPrefix "valkey-" | replace "-" "_" }}
{{- end -}}
{{- end -}}

{{- define "fedmesh.selectorFlow" -}}
{{ fromYaml (include "fedmesh.selectorLabels" .) | toJson }}
{{- end -}}

{{/* Host names of the pods of Valkey, as a YAML list. */}}
{{- define "fedmesh.valkeyNames" -}}
- {{ include "fedmesh.host" (dict "root" . "host" "valkey") }}
- "*.{{ include "fedmesh.host" (dict "root" . "host" "valkey") }}"
- localhost
{{- end -}}

{{/* Host name of one pod of Valkey. Takes root and number. */}}
{{- define "fedmesh.valkeyPod" -}}
{{ include "fedmesh.fullname" .root }}-valkey-{{ .number }}.{{ include "fedmesh.host" (dict "root" .root "host" "valkey") }}
{{- end -}}
