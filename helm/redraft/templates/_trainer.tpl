{{- /* Flags that `redraft-train run` and `loop` share */ -}}
{{- define "redraft.trainer.args" -}}
- --target
- {{ .Values.server.config.model.target | quote }}
- --traffic
- {{ include "redraft.storage.url" (list .Values.storage.trafficLog "traffic") | quote }}
- --registry
- {{ include "redraft.storage.url" (list .Values.storage.registry "registry") | quote }}
- --work-dir
- /var/lib/redraft/work
{{- range .Values.retraining.args }}
- {{ . | quote }}
{{- end }}
{{- end -}}

{{- /* A Pod template. Call with (list $ "run"|"loop" "Never"|"Always") */ -}}
{{- define "redraft.trainer.template" -}}
{{- $root := index . 0 -}}
{{- $trainer := $root.Values.retraining -}}
{{- $env := dict -}}
{{- include "redraft.env.common" (list $env $root) -}}
{{- if eq (index . 1) "run" -}}
{{- /* Refused by the gate, and not enough data: nothing to publish this time, and no failure. A podFailurePolicy has
no action that makes a Job succeed ("Ignore" would start the Pod again and again), so the image says it. */ -}}
{{- include "redraft.env.add" (list $env (dict "REDRAFT_DONE_CODES" "3 4")) -}}
{{- end -}}
{{- if dig "limits" "cpu" "" $trainer.resources -}}
{{- include "redraft.env.add" (list $env (dict "OMP_NUM_THREADS" (dict "valueFrom" (dict "resourceFieldRef" (dict "resource" "limits.cpu" "divisor" "1"))))) -}}
{{- end -}}
{{- include "redraft.env.addExtra" (list $env $trainer.extraEnv) -}}
metadata:
  labels:
    {{- include "redraft.labels" (list $root "trainer") | nindent 4 }}
  {{- with $trainer.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "redraft.trainerAccount" $root }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- with $root.Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- toYaml $root.Values.podSecurityContext | nindent 4 }}
  restartPolicy: {{ index . 2 }}
  # For a checkpoint after SIGTERM
  terminationGracePeriodSeconds: 120
  {{- include "redraft.placement" $trainer | trim | nindent 2 }}
  containers:
    - name: trainer
      image: {{ include "redraft.image" $root | quote }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      args:
        - train
        - {{ index . 1 }}
        {{- include "redraft.trainer.args" $root | nindent 8 }}
      env:
        {{- include "redraft.env.list" $env | trim | nindent 8 }}
      securityContext:
        {{- toYaml $root.Values.securityContext | nindent 8 }}
      {{- with include "redraft.resources" $trainer | fromYaml }}
      resources:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      volumeMounts:
        {{- include "redraft.mounts" (list $root true) | nindent 8 }}
        {{- include "redraft.storage.mount" (list $root.Values.storage.work "work" "/var/lib/redraft/work" false) | trim | nindent 8 }}
  volumes:
    {{- include "redraft.volumes" $root | nindent 4 }}
    {{- include "redraft.storage.volume" (list $root $root.Values.storage.work "work") | trim | nindent 4 }}
{{- end -}}

{{- define "redraft.trainer.jobSpec" -}}
{{- include "redraft.job.tries" (list .Values.retraining "trainer") }}
template:
  {{- include "redraft.trainer.template" (list . "run" "Never") | nindent 2 }}
{{- end -}}

{{- /* How long and how often a Job is tried. Call with (list $values "container") */ -}}
{{- define "redraft.job.tries" -}}
{{- $job := index . 0 -}}
backoffLimit: {{ $job.backoffLimit }}
activeDeadlineSeconds: {{ int64 $job.activeDeadlineSeconds }}
ttlSecondsAfterFinished: {{ int64 $job.ttlSecondsAfterFinished }}
podFailurePolicy:
  rules:
    # Evicted or preempted: not the run's fault, it starts again and goes on where it was
    - action: Ignore
      onPodConditions:
        - type: DisruptionTarget
          status: "True"
    # Wrong usage: trying again would end the same way
    - action: FailJob
      onExitCodes:
        containerName: {{ index . 1 }}
        operator: In
        values: [2]
{{- end -}}
