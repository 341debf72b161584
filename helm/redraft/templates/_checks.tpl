{{- /* What the schema cannot say: values that do not go together. Each line says what to do. */ -}}
{{- define "redraft.checks" -}}
{{- $v := .Values -}}
{{- if and $v.retraining.cron.enabled $v.retraining.loop.enabled -}}
{{- fail "retraining.cron and retraining.loop would both train: enable one of the two" -}}
{{- end -}}
{{- if and $v.metrics.serviceMonitor.enabled $v.metrics.podMonitor.enabled -}}
{{- fail "metrics.serviceMonitor and metrics.podMonitor would both scrape, and every rate would count twice: enable one of the two" -}}
{{- end -}}
{{- range $name, $storage := $v.storage -}}
{{- if and (eq $storage.type "existingClaim") (not $storage.existingClaim) -}}
{{- fail (printf "storage.%s.type is existingClaim: name it in storage.%s.existingClaim" $name $name) -}}
{{- end -}}
{{- if and (ne $storage.type "existingClaim") $storage.existingClaim -}}
{{- fail (printf "storage.%s.existingClaim is set, but its type is %s: set the type to existingClaim" $name $storage.type) -}}
{{- end -}}
{{- if and (eq $storage.type "newClaim") (not $storage.size) -}}
{{- fail (printf "storage.%s.type is newClaim: give storage.%s.size" $name $name) -}}
{{- end -}}
{{- if and (eq $storage.type "url") (not $storage.url) -}}
{{- fail (printf "storage.%s.type is url: give it in storage.%s.url" $name $name) -}}
{{- end -}}
{{- if and (ne $storage.type "url") $storage.url -}}
{{- fail (printf "storage.%s.url is set, but its type is %s: set the type to url" $name $storage.type) -}}
{{- end -}}
{{- end -}}
{{- if include "redraft.trains" . -}}
{{- range $name := list "trafficLog" "registry" -}}
{{- $type := (get $v.storage $name).type -}}
{{- if has $type (list "none" "emptyDir") -}}
{{- fail (printf "retraining reads and writes what the servers do: storage.%s.type must be newClaim, existingClaim or url, not %s" $name $type) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and $v.retention.enabled (has $v.storage.trafficLog.type (list "none" "emptyDir")) -}}
{{- fail (printf "retention deletes what the servers have recorded: storage.trafficLog.type must be newClaim, existingClaim or url, not %s" $v.storage.trafficLog.type) -}}
{{- end -}}
{{- if and $v.tls.clientAuth (not $v.tls.existingSecret) -}}
{{- fail "tls.clientAuth needs tls.existingSecret" -}}
{{- end -}}
{{- if and $v.tls.clientAuth (not $v.tls.testClientSecret) -}}
{{- fail "tls.clientAuth: helm test is a client too, name its certificate in tls.testClientSecret" -}}
{{- end -}}
{{- if and $v.auth.existingSecret (not $v.test.apiKeySecret) -}}
{{- fail "auth.existingSecret: helm test is a client too, name a Secret with an API key in test.apiKeySecret" -}}
{{- end -}}
{{- $processes := dig "model" "tensor_parallel" 1 $v.server.config -}}
{{- if and (gt (int $processes) 1) (ne (int $processes) (int $v.server.gpu.count)) -}}
{{- fail (printf "server.config.model.tensor_parallel is %v: set server.gpu.count to as many" $processes) -}}
{{- end -}}
{{- if and (eq $v.server.strategy.type "RollingUpdate") (not $v.server.strategy.maxSurge) (not $v.server.strategy.maxUnavailable) -}}
{{- fail "server.strategy: an update cannot proceed with maxSurge and maxUnavailable both 0" -}}
{{- end -}}
{{- if hasKey $v.server.configFromSecret "traffic_log.spool_bytes" -}}
{{- fail "server.configFromSecret: traffic_log.spool_bytes decides the size of a volume, so give it in server.config" -}}
{{- end -}}
{{- if and $v.autoscaling.enabled (gt (int $v.autoscaling.minReplicas) (int $v.autoscaling.maxReplicas)) -}}
{{- fail "autoscaling.minReplicas is more than autoscaling.maxReplicas" -}}
{{- end -}}
{{- end -}}
