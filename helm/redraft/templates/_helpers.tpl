{{- define "redraft.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- /* At most 40 characters, so that every suffix still makes a valid name */ -}}
{{- define "redraft.fullname" -}}
{{- $name := include "redraft.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- /* Call with (list $ "component") */ -}}
{{- define "redraft.selectorLabels" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "redraft.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "redraft.labels" -}}
{{- $root := index . 0 -}}
{{- $own := include "redraft.selectorLabels" . | fromYaml -}}
{{- $_ := set $own "helm.sh/chart" (printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_") -}}
{{- $_ := set $own "app.kubernetes.io/version" $root.Chart.AppVersion -}}
{{- $_ := set $own "app.kubernetes.io/managed-by" $root.Release.Service -}}
{{- merge $own $root.Values.commonLabels | toYaml -}}
{{- end -}}

{{- define "redraft.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "redraft.serverAccount" -}}
{{- .Values.serviceAccount.name | default (.Values.serviceAccount.create | ternary (include "redraft.fullname" .) "default") -}}
{{- end -}}

{{- define "redraft.trainerAccount" -}}
{{- .Values.serviceAccount.trainerName | default (.Values.serviceAccount.create | ternary (printf "%s-trainer" (include "redraft.fullname" .)) "default") -}}
{{- end -}}

{{- define "redraft.trains" -}}
{{- if or .Values.retraining.cron.enabled .Values.retraining.loop.enabled .Values.retraining.runNow -}}true{{- end -}}
{{- end -}}

{{- /* The address by which clients balance their calls over all servers */ -}}
{{- define "redraft.clientAddress" -}}
dns:///{{ include "redraft.fullname" . }}-headless.{{ .Release.Namespace }}:50051
{{- end -}}

{{- /* Resources with the GPUs among the limits. Call with server or retraining values */ -}}
{{- define "redraft.resources" -}}
{{- $resources := deepCopy .resources -}}
{{- if .gpu.count -}}
{{- $limits := merge (dict .gpu.resourceName (.gpu.count | toString)) ($resources.limits | default dict) -}}
{{- $_ := set $resources "limits" $limits -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- /* Where a Pod runs. Call with server or retraining values */ -}}
{{- define "redraft.placement" -}}
{{- with .runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}
