{{- /* Environment is collected in one map and rendered once, so that no name can occur twice: Helm 4 applies on the
server side, where a second one is an error, and before that the last one silently won. */ -}}

{{- /* Call with (list $all $more): adds $more to $all, and ends the rendering if a name is there already */ -}}
{{- define "redraft.env.add" -}}
{{- $all := index . 0 -}}
{{- range $name, $value := index . 1 -}}
{{- if hasKey $all $name -}}
{{- fail (printf "the environment variable %s is set by the chart already: use the value that is meant for it, and remove this one" $name) -}}
{{- end -}}
{{- $_ := set $all $name $value -}}
{{- end -}}
{{- end -}}

{{- /* Call with (list $all $extraEnv) */ -}}
{{- define "redraft.env.addExtra" -}}
{{- range $name, $value := index . 1 -}}
{{- if hasPrefix "REDRAFT_SERVER__" (upper $name) -}}
{{- fail (printf "extraEnv.%s is a setting of the server: give it in server.config, or in server.configFromSecret" $name) -}}
{{- end -}}
{{- end -}}
{{- include "redraft.env.add" . -}}
{{- end -}}

{{- /* The map as a list, by name. A value is a string, or a map with valueFrom */ -}}
{{- define "redraft.env.list" -}}
{{- range $name, $value := . }}
- name: {{ $name }}
  {{- if kindIs "map" $value }}
  {{- toYaml $value | nindent 2 }}
  {{- else }}
  value: {{ $value | quote }}
  {{- end }}
{{- end }}
{{- end -}}

{{- /* A setting of the server as environment variable: "group.name" */ -}}
{{- define "redraft.env.setting" -}}
REDRAFT_SERVER__{{ . | replace "." "__" | upper }}
{{- end -}}

{{- /* What servers and trainer share: caches and credentials. Call with (list $all $) */ -}}
{{- define "redraft.env.common" -}}
{{- $all := index . 0 -}}
{{- $root := index . 1 -}}
{{- $common := dict "HOME" "/tmp" "HF_HOME" "/var/cache/redraft/huggingface" "REDRAFT_CACHE_DIR" "/var/cache/redraft/models" -}}
{{- with $root.Values.huggingFace.existingSecret -}}
{{- $_ := set $common "HF_TOKEN" (include "redraft.env.secret" (list . $root.Values.huggingFace.key) | fromYaml) -}}
{{- end -}}
{{- include "redraft.env.add" (list $all $common) -}}
{{- include "redraft.env.objectStore" (list $all $root) -}}
{{- end -}}

{{- /* Call with (list $all $) */ -}}
{{- define "redraft.env.objectStore" -}}
{{- $store := (index . 1).Values.objectStore -}}
{{- $own := dict -}}
{{- with $store.existingSecret -}}
{{- $_ := set $own "AWS_ACCESS_KEY_ID" (include "redraft.env.secret" (list . $store.accessKeyIdKey) | fromYaml) -}}
{{- $_ := set $own "AWS_SECRET_ACCESS_KEY" (include "redraft.env.secret" (list . $store.secretAccessKeyKey) | fromYaml) -}}
{{- end -}}
{{- with $store.endpointUrl }}{{ $_ := set $own "AWS_ENDPOINT_URL" . }}{{ end -}}
{{- with $store.region }}{{ $_ := set $own "AWS_DEFAULT_REGION" . }}{{ end -}}
{{- include "redraft.env.add" (list (index . 0) $own) -}}
{{- end -}}

{{- define "redraft.env.secret" -}}
valueFrom:
  secretKeyRef:
    name: {{ index . 0 }}
    key: {{ index . 1 }}
{{- end -}}

{{- /* The server's environment, as a list */ -}}
{{- define "redraft.env.server" -}}
{{- $all := dict -}}
{{- include "redraft.env.common" (list $all .) -}}
{{- $own := dict
  "REDRAFT_SERVER__GRPC__HOST" "0.0.0.0"
  "REDRAFT_SERVER__GRPC__PORT" "50051"
  "REDRAFT_SERVER__METRICS__HOST" "0.0.0.0"
  "REDRAFT_SERVER__METRICS__PORT" "9090"
  "REDRAFT_SERVER__DRAIN__DELAY_S" (.Values.server.drain.delaySeconds | toJson)
  "REDRAFT_SERVER__DRAIN__GRACE_S" (.Values.server.drain.graceSeconds | toJson)
-}}
{{- if .Values.tls.existingSecret -}}
{{- $_ := set $own "REDRAFT_SERVER__GRPC__TLS_CERT" "/etc/redraft/tls/tls.crt" -}}
{{- $_ := set $own "REDRAFT_SERVER__GRPC__TLS_KEY" "/etc/redraft/tls/tls.key" -}}
{{- if .Values.tls.clientAuth -}}
{{- $_ := set $own "REDRAFT_SERVER__GRPC__TLS_CLIENT_CA" "/etc/redraft/tls/ca.crt" -}}
{{- end -}}
{{- end -}}
{{- if .Values.auth.existingSecret -}}
{{- $_ := set $own "REDRAFT_SERVER__AUTH__KEYS_FILE" "/etc/redraft/auth/keys.yaml" -}}
{{- end -}}
{{- with include "redraft.storage.url" (list .Values.storage.trafficLog "traffic") -}}
{{- $_ := set $own "REDRAFT_SERVER__TRAFFIC_LOG__URL" . -}}
{{- end -}}
{{- if .Values.retention.enabled -}}
{{- /* One place deletes: the CronJob */ -}}
{{- $_ := set $own "REDRAFT_SERVER__TRAFFIC_LOG__RETENTION_DAYS" "null" -}}
{{- end -}}
{{- if include "redraft.spools" . -}}
{{- $_ := set $own "REDRAFT_SERVER__TRAFFIC_LOG__SPOOL_DIR" "/var/lib/redraft/spool" -}}
{{- end -}}
{{- with include "redraft.storage.url" (list .Values.storage.registry "registry") -}}
{{- $_ := set $own "REDRAFT_SERVER__REGISTRY__URL" . -}}
{{- end -}}
{{- if and (dig "limits" "cpu" "" .Values.server.resources) (not (dig "model" "threads" "" .Values.server.config)) -}}
{{- /* The process sees every core of the node; its limit is what it may use */ -}}
{{- $_ := set $own "OMP_NUM_THREADS" (dict "valueFrom" (dict "resourceFieldRef" (dict "resource" "limits.cpu" "divisor" "1"))) -}}
{{- end -}}
{{- include "redraft.env.add" (list $all $own) -}}
{{- range $group, $settings := .Values.server.config -}}
{{- range $name, $value := $settings -}}
{{- $variable := include "redraft.env.setting" (printf "%s.%s" $group $name) -}}
{{- include "redraft.env.add" (list $all (dict $variable (kindIs "string" $value | ternary $value (toJson $value)))) -}}
{{- end -}}
{{- end -}}
{{- range $setting, $key := .Values.server.configFromSecret -}}
{{- $variable := include "redraft.env.setting" $setting -}}
{{- include "redraft.env.add" (list $all (dict $variable (include "redraft.env.secret" (list $key.name $key.key) | fromYaml))) -}}
{{- end -}}
{{- include "redraft.env.addExtra" (list $all .Values.server.extraEnv) -}}
{{- include "redraft.env.list" $all -}}
{{- end -}}
