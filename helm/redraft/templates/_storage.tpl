{{- /* Where something is kept, for a setting or a flag. Call with (list .Values.storage.X "directory") */ -}}
{{- define "redraft.storage.url" -}}
{{- $storage := index . 0 -}}
{{- if eq $storage.type "url" -}}
{{- $storage.url -}}
{{- else if ne $storage.type "none" -}}
/var/lib/redraft/{{ index . 1 }}
{{- end -}}
{{- end -}}

{{- /* A volume. Call with (list $ .Values.storage.X "volume-name") */ -}}
{{- define "redraft.storage.volume" -}}
{{- $storage := index . 1 -}}
{{- if has $storage.type (list "emptyDir" "newClaim" "existingClaim") }}
- name: {{ index . 2 }}
  {{- if eq $storage.type "emptyDir" }}
  emptyDir:
    {{- if $storage.size }}
    sizeLimit: {{ $storage.size }}
    {{- else }} {}
    {{- end }}
  {{- else if eq $storage.type "newClaim" }}
  persistentVolumeClaim:
    claimName: {{ include "redraft.fullname" (index . 0) }}-{{ index . 2 }}
  {{- else }}
  persistentVolumeClaim:
    claimName: {{ $storage.existingClaim }}
  {{- end }}
{{- end }}
{{- end -}}

{{- /* Call with (list .Values.storage.X "volume-name" "path" readOnly) */ -}}
{{- define "redraft.storage.mount" -}}
{{- if has (index . 0).type (list "emptyDir" "newClaim" "existingClaim") }}
- name: {{ index . 1 }}
  mountPath: {{ index . 2 }}
  {{- if index . 3 }}
  readOnly: true
  {{- end }}
{{- end }}
{{- end -}}

{{- /* Whether the traffic log is in an object store: then servers have a spool */ -}}
{{- define "redraft.spools" -}}
{{- if or (eq .Values.storage.trafficLog.type "url") (hasKey .Values.server.configFromSecret "traffic_log.url") -}}true{{- end -}}
{{- end -}}

{{- /* What the spool may hold and some room: beyond this limit a Pod is evicted */ -}}
{{- define "redraft.spoolLimit" -}}
{{- add (dig "traffic_log" "spool_bytes" 1073741824 .Values.server.config | int64) 67108864 -}}
{{- end -}}

{{- /* Volumes that servers and trainer share, and /tmp, since the root file system is read-only */ -}}
{{- define "redraft.volumes" -}}
- name: tmp
  emptyDir: {}
{{- include "redraft.storage.volume" (list . .Values.storage.modelCache "model-cache") }}
{{- include "redraft.storage.volume" (list . .Values.storage.trafficLog "traffic-log") }}
{{- include "redraft.storage.volume" (list . .Values.storage.registry "registry") }}
{{- end -}}

{{- /* Call with (list $ trafficLogIsReadOnly) */ -}}
{{- define "redraft.mounts" -}}
{{- $storage := (index . 0).Values.storage -}}
- name: tmp
  mountPath: /tmp
{{- include "redraft.storage.mount" (list $storage.modelCache "model-cache" "/var/cache/redraft" false) }}
{{- include "redraft.storage.mount" (list $storage.trafficLog "traffic-log" "/var/lib/redraft/traffic" (index . 1)) }}
{{- include "redraft.storage.mount" (list $storage.registry "registry" "/var/lib/redraft/registry" false) }}
{{- end -}}
