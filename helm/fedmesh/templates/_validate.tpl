{{/* What a schema cannot say, or not so that one knows what to do. */}}
{{- define "fedmesh.validate" -}}
{{- range $name, $service := .Values.services -}}
{{- $least := ternary $service.autoscaling.minReplicas $service.replicas $service.autoscaling.enabled -}}
{{- with $service.pdb.minAvailable -}}
{{- if ge (int .) (int $least) -}}
{{- fail (printf "services.%s.pdb.minAvailable is %v of %v replicas, so no node could ever be drained: lower it, or use maxUnavailable: 1" $name . $least) -}}
{{- end -}}
{{- end -}}
{{- if gt (int $service.autoscaling.minReplicas) (int $service.autoscaling.maxReplicas) -}}
{{- fail (printf "services.%s.autoscaling: minReplicas is above maxReplicas: raise maxReplicas" $name) -}}
{{- end -}}
{{- if eq ($service.image.tag | default $.Values.image.tag) "latest" -}}
{{- fail (printf "the image of %s has the tag latest, which is another image tomorrow: name a version or a digest" $name) -}}
{{- end -}}
{{- end -}}
{{- if and (eq .Values.profile "production") (eq .Values.consortium "consortium.local") -}}
{{- fail "consortium is still consortium.local: choose your own trust domain, such as fedmesh.example; it cannot be changed later" -}}
{{- end -}}
{{- if ne (len (uniq (list .Values.ports.grpc .Values.ports.health .Values.ports.metrics .Values.ports.ops))) 4 -}}
{{- fail "ports.grpc, ports.health, ports.metrics and ports.ops must differ" -}}
{{- end -}}
{{- end -}}
