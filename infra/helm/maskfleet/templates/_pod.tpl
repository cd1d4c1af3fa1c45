{{/* Parts that every pod has. Those with a component take (dict "root" $ "component" "worker" …). */}}

{{- define "maskfleet.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-{{ .Chart.Name }}{{ end }}
{{- end }}

{{- define "maskfleet.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "maskfleet.labels" -}}
{{ include "maskfleet.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- define "maskfleet.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "maskfleet.name" .) "default" .Values.serviceAccount.create) }}
{{- end }}

{{/* Who the pod is. Settings begin with MASKFLEET_, and so would the variables of service links. */}}
{{- define "maskfleet.pod" -}}
enableServiceLinks: false
automountServiceAccountToken: false
shareProcessNamespace: true  # its first process reaps the supervisor's orphans, and a frozen command can be killed
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Where it runs. values: those of the component. */}}
{{- define "maskfleet.place" -}}
{{- with .values.nodeSelector }}
nodeSelector: {{ toJson . }}
{{- end }}
{{- with .values.tolerations }}
tolerations: {{ toJson . }}
{{- end }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "maskfleet.selector" . | nindent 8 }}
{{- end }}

{{- define "maskfleet.container" -}}
image: {{ printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* keys: the names below `secret.keys` that this pod reads. */}}
{{- define "maskfleet.secretVolume" -}}
- name: secrets
  secret:
    secretName: {{ .root.Values.secret.name }}
    defaultMode: 0440
    items:
      {{- range .keys }}
      {{- with index $.root.Values.secret.keys . }}
      - {key: {{ . }}, path: {{ . }}}
      {{- end }}
      {{- end }}
- name: tmp
  emptyDir: {sizeLimit: 1Gi}
{{- end }}

{{- define "maskfleet.mounts" -}}
- {name: secrets, mountPath: /run/secrets/maskfleet, readOnly: true}
- {name: tmp, mountPath: /tmp}
{{- end }}

{{/* A claim if there is one, otherwise a folder that ends with the pod. (dict "name" … "values" …) */}}
{{- define "maskfleet.folder" -}}
- name: {{ .name }}
  {{- if .values.existingClaim }}
  persistentVolumeClaim: {claimName: {{ .values.existingClaim }}}
  {{- else }}
  emptyDir: {sizeLimit: {{ .values.size }}}
  {{- end }}
{{- end }}

{{- define "maskfleet.secretFile" -}}
- name: {{ .variable }}
  value: {{ printf "/run/secrets/maskfleet/%s" .key | quote }}
{{- end }}

{{- define "maskfleet.databaseEnv" -}}
{{ include "maskfleet.secretFile" (dict "variable" "MASKFLEET_DATABASE_URL_FILE" "key" .Values.secret.keys.databaseUrl) }}
{{- end }}

{{- define "maskfleet.brokerEnv" -}}
{{ include "maskfleet.secretFile" (dict "variable" "MASKFLEET_BROKER_URL_FILE" "key" .Values.secret.keys.brokerUrl) }}
{{- end }}

{{/* What reads images needs. */}}
{{- define "maskfleet.imagesEnv" -}}
- {name: AWS_DEFAULT_REGION, value: {{ .Values.s3.region | quote }}}
{{- with .Values.secret.keys.awsCredentials }}
{{ include "maskfleet.secretFile" (dict "variable" "AWS_SHARED_CREDENTIALS_FILE" "key" .) }}
{{- end }}
{{- with .Values.s3.endpoint }}
- {name: MASKFLEET_S3_ENDPOINT, value: {{ . | quote }}}
{{- end }}
{{- range $name, $value := .Values.settings }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end }}

{{/* What dispatch, worker, publisher and assist share. */}}
{{- define "maskfleet.commonEnv" -}}
{{ include "maskfleet.databaseEnv" . }}
{{ include "maskfleet.brokerEnv" . }}
{{ include "maskfleet.imagesEnv" . }}
{{- with .Values.embeddings }}
- {name: MASKFLEET_EMBEDDINGS, value: {{ . | quote }}}
{{- end }}
- {name: MASKFLEET_WEIGHTS_DIR, value: /weights}
- {name: HF_HOME, value: /weights/huggingface}
{{- with .Values.weights.mirror }}
- {name: MASKFLEET_WEIGHTS_MIRROR, value: {{ . | quote }}}
{{- end }}
{{- end }}

{{- define "maskfleet.labelStudioEnv" -}}
{{- with .Values.labelStudio.url }}
- {name: MASKFLEET_LABEL_STUDIO_URL, value: {{ . | quote }}}
{{- end }}
{{- with .Values.labelStudio.project }}
- {name: MASKFLEET_LABEL_STUDIO_PROJECT, value: {{ int . | quote }}}
{{- end }}
{{- with .Values.secret.keys.labelStudioApiKey }}
{{ include "maskfleet.secretFile" (dict "variable" "MASKFLEET_LABEL_STUDIO_API_KEY_FILE" "key" .) }}
{{- end }}
{{- end }}

{{- define "maskfleet.assistEnv" -}}
{{- with .Values.secret.keys.assistPassword }}
{{ include "maskfleet.secretFile" (dict "variable" "MASKFLEET_ASSIST_PASSWORD_FILE" "key" .) }}
{{- end }}
{{- end }}

{{/*
Whether the pod is well, as in docker-compose.yml. When its heartbeat has stopped although Postgres answers, this check
kills the command, and Kubernetes starts it again. As a livenessProbe it would also end every pod while Postgres is away.
*/}}
{{- define "maskfleet.heartbeatProbe" -}}
readinessProbe:
  exec: {command: [python, -I, /app/infra/healthcheck.py, {{ .argument }}, {{ .kind }}]}
  initialDelaySeconds: 10
  periodSeconds: 30
  timeoutSeconds: 10
  failureThreshold: 3
{{- end }}

{{- define "maskfleet.requireLabelStudio" -}}
{{- if not (and .root.Values.labelStudio.url .root.Values.labelStudio.project .root.Values.secret.keys.labelStudioApiKey) }}
{{- fail (printf "%s.enabled needs labelStudio.url, labelStudio.project and secret.keys.labelStudioApiKey" .component) }}
{{- end }}
{{- end }}
