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
{{- range $where, $image := dict "postgres.single.image" .Values.postgres.single.image "postgres.cloudNativePG.image" .Values.postgres.cloudNativePG.image "valkey.image" .Values.valkey.image -}}
{{- if or (hasSuffix ":latest" $image) (not (regexMatch "[:@][^/]+$" $image)) -}}
{{- fail (printf "%s is %s, which is another image tomorrow: name a version or a digest" $where $image) -}}
{{- end -}}
{{- end -}}
{{- if eq (.Values.jobs.image.tag | default .Values.image.tag) "latest" -}}
{{- fail "the image of the Jobs has the tag latest, which is another image tomorrow: name a version or a digest" -}}
{{- end -}}
{{- if and (eq .Values.profile "production") (eq .Values.consortium "consortium.local") -}}
{{- fail "consortium is still consortium.local: choose your own trust domain, such as fedmesh.example; it cannot be changed later" -}}
{{- end -}}
{{- if ne (len (uniq (list .Values.ports.grpc .Values.ports.health .Values.ports.metrics .Values.ports.ops .Values.ports.enrolment))) 5 -}}
{{- fail "ports.grpc, ports.health, ports.metrics, ports.ops and ports.enrolment must differ" -}}
{{- end -}}
{{- if and .Values.people.enabled (not (has "consortium-admin" (values .Values.people.roles))) -}}
{{- fail "people.roles gives nobody the role consortium-admin: name the group that decides who takes part" -}}
{{- end -}}
{{- if and .Values.enrolment.enabled (eq .Values.external.mode "gateway") (not .Values.external.hosts.enrolment) -}}
{{- fail "external.hosts.enrolment: a gateway needs a host name of its own for the listener at which hospitals enrol" -}}
{{- end -}}
{{- if and .Values.enrolment.enabled (eq .Values.external.loadBalancer.enrolmentPort .Values.external.loadBalancer.port) -}}
{{- fail "external.loadBalancer.port and enrolmentPort must differ: the registry listens at both" -}}
{{- end -}}
{{- end -}}
