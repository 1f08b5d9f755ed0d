{{/* Pod of a Job that runs one command of services.deployment. Takes root, component, account, command, config (name of a
     ConfigMap), secrets (list of name, secret, keys, path) and api (whether it talks to the API server). */}}
{{- define "fedmesh.jobPod" -}}
{{- $common := dict "root" .root "account" .account -}}
{{- $pod := fromYaml (include "fedmesh.podCommon" $common) -}}
{{- if .api }}{{ $_ := set $pod "automountServiceAccountToken" true }}{{ end -}}
metadata:
  labels: {{- include "fedmesh.podLabels" . | nindent 4 }}
spec:
  {{- toYaml $pod | nindent 2 }}
  restartPolicy: Never
  terminationGracePeriodSeconds: 10
  securityContext: {{- toYaml .root.Values.podSecurityContext | nindent 4 }}
  containers:
    - name: {{ .component }}
      image: {{ include "fedmesh.image" (dict "root" .root "image" .root.Values.jobs.image "name" "deployment") }}
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      command: [python, -m, services.deployment, {{ .command }}, --config, /etc/fedmesh/config/{{ .command }}.yaml]
      env: {{- include "fedmesh.env" .root | nindent 8 }}
      resources: {{- toYaml .root.Values.jobs.resources | nindent 8 }}
      securityContext: {{- include "fedmesh.containerSecurity" .root | nindent 8 }}
      volumeMounts:
        - {name: config, mountPath: /etc/fedmesh/config, readOnly: true}
        {{- range .secrets }}
        - {name: {{ .name }}, mountPath: {{ .path }}, readOnly: true}
        {{- end }}
        - {name: scratch, mountPath: /tmp}
  volumes:
    - name: config
      configMap: {name: {{ .config }}}
    {{- range .secrets }}
    {{- include "fedmesh.secretVolume" . | nindent 4 }}
    {{- end }}
    - name: scratch
      emptyDir: {sizeLimit: 64Mi, medium: Memory}
{{- end -}}
