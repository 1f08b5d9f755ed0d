{{/* Egress rules towards the stores and the API server. */}}
{{- define "fedmesh.postgresEgress" -}}
{{- if eq .Values.postgres.mode "external" -}}
- to: {{- toYaml (required "postgres.external.peers: name the addresses of your PostgreSQL" .Values.postgres.external.peers) | nindent 4 }}
  ports: [{port: {{ .Values.postgres.external.port }}}]
{{- else if eq .Values.postgres.mode "cloudNativePG" -}}
- to: [{podSelector: {matchLabels: {cnpg.io/cluster: {{ include "fedmesh.fullname" . }}-postgres}}}]
  ports: [{port: 5432}]
{{- else -}}
- to: [{podSelector: {matchLabels: {{ include "fedmesh.selectorFlow" (dict "root" . "component" "postgres") }}}}]
  ports: [{port: 5432}]
{{- end -}}
{{- end -}}

{{- define "fedmesh.valkeyEgress" -}}
{{- if eq .Values.valkey.mode "external" -}}
- to: {{- toYaml (required "valkey.external.peers: name the addresses of your Redis" .Values.valkey.external.peers) | nindent 4 }}
  ports:
    {{- range .Values.valkey.external.ports }}
    - {port: {{ . }}}
    {{- end }}
{{- else -}}
- to: [{podSelector: {matchLabels: {{ include "fedmesh.selectorFlow" (dict "root" . "component" "valkey") }}}}]
  ports: [{port: 6379}{{ if eq .Values.valkey.mode "sentinel" }}, {port: 26379}{{ end }}]
{{- end -}}
{{- end -}}

{{- define "fedmesh.apiServerEgress" -}}
{{- $server := .Values.networkPolicy.apiServer -}}
- ports:
    {{- range $server.ports }}
    - {port: {{ . }}}
    {{- end }}
  {{- with $server.peers }}
  to: {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}
