{{- define "hospital.fullname" -}}
{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- end -}}

{{- define "hospital.selectorLabels" -}}
app.kubernetes.io/name: fedmesh-hospital
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "hospital.labels" -}}
{{ include "hospital.selectorLabels" . }}
app.kubernetes.io/part-of: fedmesh
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{/* Labels of pods: what never changes, and what the consortium's NetworkPolicies look for in the same cluster. */}}
{{- define "hospital.podLabels" -}}
{{ include "hospital.selectorLabels" . }}
app.kubernetes.io/part-of: fedmesh
fedmesh.io/caller: hospital
{{- end -}}

{{- define "hospital.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "hospital.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "hospital.podCommon" -}}
serviceAccountName: {{ include "hospital.fullname" . }}
automountServiceAccountToken: false
enableServiceLinks: false
# Names here are whole. Tried first with the search domains of the node, they would hang where no name server answers for those.
dnsConfig: {options: [{name: ndots, value: "1"}]}
securityContext: {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{- define "hospital.tlsVolume" -}}
- name: tls
  secret:
    secretName: {{ .Values.tls.existingSecret }}
    defaultMode: 0440
    items:
      - {key: ca.crt, path: ca.crt}
      - {key: tls.crt, path: tls.crt}
      - {key: tls.key, path: tls.key}
{{- end -}}

{{- define "hospital.tlsFiles" -}}
{{- if .Values.enrolment.registry -}}
ca: /var/lib/fedmesh/tls/ca.pem
certificate: /var/lib/fedmesh/tls/current/certificate.pem
key: /var/lib/fedmesh/tls/current/key.pem
{{- else -}}
ca: /etc/fedmesh/tls/ca.crt
certificate: /etc/fedmesh/tls/tls.crt
key: /etc/fedmesh/tls/tls.key
{{- end -}}
{{- end -}}

{{/* Enrols when the token is another one than the last that was used: after the first start, and after a new invitation. */}}
{{- define "hospital.enrol" -}}
used=/var/lib/fedmesh/token.sha256
sum=$(sha256sum < /etc/fedmesh/token/token)
if [ "$(cat "$used" 2>/dev/null)" = "$sum" ]; then exit 0; fi
python -m services.cli.at_hospital enrol --token-file /etc/fedmesh/token/token --ca /etc/fedmesh/authority/ca.crt --out /var/lib/fedmesh/tls \
  --registry "$1"
echo "$sum" > "$used"
{{- end -}}

{{/* What all of fedmesh's processes here find in their environment. */}}
{{- define "hospital.env" -}}
- {name: HOME, value: /tmp}
- {name: TMPDIR, value: /tmp}
- {name: PYTHONUNBUFFERED, value: "1"}
{{- end -}}

{{/* The node's configuration file. */}}
{{- define "hospital.config" -}}
{{- $data := dict "file" (printf "/var/lib/fedmesh-data/%s" .Values.data.file) -}}
{{- if eq .Values.data.source "fhir" -}}
{{- $data = dict "fhir" (dict "folder" (printf "/var/lib/fedmesh-data/%s" .Values.data.fhirFolder)) -}}
{{- else if eq .Values.data.source "omop" -}}
{{- $omop := dict "dsn_file" (printf "/etc/fedmesh/omop/%s" .Values.data.omop.key) "cdm_schema" .Values.data.omop.cdmSchema "statement_timeout_s" .Values.data.omop.statementTimeoutS -}}
{{- with .Values.data.omop.vocabularySchema -}}{{- $_ := set $omop "vocabulary_schema" . -}}{{- end -}}
{{- $data = dict "omop" $omop -}}
{{- end -}}
{{- if .Values.data.sqlConfigMap -}}{{- $_ := set $data "sql" "/etc/fedmesh/sql/mapping.sql" -}}{{- end -}}
{{- with .Values.data.until -}}{{- $_ := set $data "until" . -}}{{- end -}}
{{- if .Values.data.mappingConfigMap -}}{{- $_ := set $data "mapping" "/etc/fedmesh/mapping/mapping.yaml" -}}{{- end -}}
{{- $config := dict
      "hospital_id" .Values.hospitalId
      "population" .Values.population
      "tls" (fromYaml (include "hospital.tlsFiles" .))
      "data" $data
      "data_dir" "/var/lib/fedmesh/node"
      "member_keys" (printf "/etc/fedmesh/member/%s" .Values.memberKeys.key)
      "roster" (printf "/etc/fedmesh/roster/%s" .Values.roster.key)
      "privacy" (dict "epsilon_limit" .Values.privacy.epsilonLimit "delta_limit" .Values.privacy.deltaLimit "max_plan_epsilon" .Values.privacy.maxPlanEpsilon "max_plan_delta" .Values.privacy.maxPlanDelta "least_colluders" .Values.privacy.leastColluders "allow_without_privacy" .Values.privacy.allowWithoutPrivacy)
      "telemetry" (dict "log_level" .Values.telemetry.logLevel)
      "health_listen" (printf "0.0.0.0:%v" .Values.ports.health)
      "metrics_listen" (printf "0.0.0.0:%v" .Values.ports.metrics) -}}
{{- range $name, $target := .Values.centre -}}{{- $_ := set $config $name (dict "target" $target) -}}{{- end -}}
{{- if .Values.privacy.approvalConfigMap -}}
{{- $_ := set $config.privacy "approvers" .Values.privacy.approvers -}}
{{- $_ := set $config.privacy "approval" (printf "/etc/fedmesh/approval/%s" .Values.privacy.approvalKey) -}}
{{- end -}}
{{- if .Values.enrolment.registry -}}{{- $_ := set $config "renewal" (dict "folder" "/var/lib/fedmesh/tls") -}}{{- end -}}
{{- if .Values.registryKey.configMap -}}{{- $_ := set $config "registry_key" (printf "/etc/fedmesh/registry/%s" .Values.registryKey.key) -}}{{- end -}}
{{- if .Values.witness.audit -}}
{{- $_ := required "witness.logKeyConfigMap: name the ConfigMap with the audit log's public key (audit.vkey)" .Values.witness.logKeyConfigMap -}}
{{- $_ := set $config "witness" (dict "audit" (dict "target" .Values.witness.audit) "log_key" (printf "/etc/fedmesh/log/%s" .Values.witness.key) "interval_s" .Values.witness.intervalS) -}}
{{- end -}}
{{- toYaml (mergeOverwrite $config (deepCopy .Values.settings)) -}}
{{- end -}}

{{/* Configuration of the check by `helm test`. */}}
{{- define "hospital.checkConfig" -}}
tls: {{- include "hospital.tlsFiles" . | nindent 2 }}
services:
  {{- range $name, $target := .Values.centre }}
  {{ $name }}: {target: {{ $target | quote }}, service: fedmesh.{{ $name }}.v1.{{ title $name }}Service}
  {{- end }}
telemetry: {log_level: warning}
{{- end -}}
