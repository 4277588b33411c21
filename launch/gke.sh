#!/usr/bin/env bash
# A stage on GKE, as a JobSet: on the TPU slices that its hardware file names, or in one pod without
# a TPU where the stage needs none. See README.md.
#   launch/gke.sh OPTIONS start NAME STAGE --gin_file=F … [--gin.NAME=VALUE …]
#   launch/gke.sh OPTIONS follow NAME
#   launch/gke.sh OPTIONS delete NAME
#   launch/gke.sh --image=I build
# Options: --project= --location= --cluster=, and for start --image= --bucket= and those below.
location='' cluster='' image=''
mount=/data         # where the bucket is mounted, to be read
service_account=default
queue=''            # of Kueue
spot='' reservation=''
restarts=10         # at most
grace=300           # seconds to save a checkpoint; a spot node gives less
cpu=8 memory=32Gi   # of a stage without a TPU
settings="project location cluster image bucket mount service-account queue reservation restarts grace cpu memory"
switches="dry-run spot"
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

connect() { # kubectl to this cluster, whatever the user's own settings are
  need project location cluster
  need_tools gcloud kubectl
  need_name
  again="--project=$project --location=$location --cluster=$cluster"
  scratch=$(mktemp -d)
  export KUBECONFIG=$scratch/kubeconfig
  run gcloud container clusters get-credentials "$cluster" --location="$location" --project="$project" ||
    fail "cluster $cluster was not reached" 1
}

# Prints one per line what is left of its arguments, indented by the first.
indent() {
  local margin
  margin=$(printf '%*s' "$1" '')
  shift
  printf "$margin%s\n" "$@"
}

manifest() {
  local i
  if [ ${#files[@]} -gt 0 ]; then
    cat << END
apiVersion: v1
kind: ConfigMap
metadata:
  name: $name-gin
data:
END
    for i in "${!files[@]}"; do indent 2 "gin-$i: ${texts[i]}"; done
    echo ---
  fi
  cat << END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
END
  [ -z "$queue" ] || indent 2 "labels:" "  kueue.x-k8s.io/queue-name: \"$queue\""
  # One slice is one node pool, and none is shared.
  [ -z "$tpu" ] ||
    indent 2 "annotations:" "  alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool"
  cat << END
spec:
  network:
    enableDNSHostnames: true
    publishNotReadyAddresses: true
  failurePolicy:
    maxRestarts: $restarts
    restartStrategy: BlockingRecreate
    rules:
    - name: mistake
      action: FailJobSet
      onJobFailureReasons:
      - PodFailurePolicy
  replicatedJobs:
  - name: slice
    replicas: ${slice[slices]:-1}
    template:
      spec:
        completionMode: Indexed
        completions: ${slice[hosts]:-1}
        parallelism: ${slice[hosts]:-1}
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes:
              containerName: pangu-tiny
              operator: In
              values:
              - 2
        template:
          metadata:
            annotations:
              gke-gcsfuse/volumes: "true"
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: $grace
            serviceAccountName: "$service_account"
END
  if [ "$tpu$spot$reservation" ]; then indent 12 "nodeSelector:"; fi
  [ -z "$tpu" ] || indent 14 "cloud.google.com/gke-tpu-accelerator: \"${slice[label]}\"" \
    "cloud.google.com/gke-tpu-topology: \"${slice[topology]}\""
  [ -z "$reservation" ] || indent 14 "cloud.google.com/reservation-name: \"$reservation\""
  [ -z "$spot" ] || indent 14 'cloud.google.com/gke-spot: "true"'
  [ -z "$spot" ] || indent 12 "tolerations:" "- key: cloud.google.com/gke-spot" \
    "  operator: Equal" '  value: "true"' "  effect: NoSchedule"
  cat << END
            containers:
            - name: pangu-tiny
              image: "$image"
              command:
END
  indent 14 "${stage_words[@]/#/- }"
  # The files of a TPU belong to root.
  [ -z "$tpu" ] || indent 14 "securityContext:" "  runAsUser: 0"
  indent 14 "resources:" "  requests:" "${resources[@]/#/    }" "  limits:" "${resources[@]/#/    }"
  if [ ${#files[@]} -gt 0 ]; then indent 14 "workingDir: /gin"; fi
  indent 14 "volumeMounts:" "- name: data" "  mountPath: \"$mount\"" "  readOnly: true"
  if [ ${#files[@]} -gt 0 ]; then indent 14 "- name: gin" "  mountPath: /gin"; fi
  cat << END
            volumes:
            - name: data
              csi:
                driver: gcsfuse.csi.storage.gke.io
                readOnly: true
                volumeAttributes:
                  bucketName: "$bucket"
                  mountOptions: implicit-dirs
END
  if [ ${#files[@]} -gt 0 ]; then
    indent 12 "- name: gin" "  configMap:" "    name: $name-gin" "    items:"
    for i in "${!files[@]}"; do indent 16 "- key: gin-$i" "  path: \"${files[i]}\""; done
  fi
}

start() {
  need project location cluster image bucket
  need_bucket
  need_number restarts grace
  need_tools gcloud kubectl
  need_name
  read_stage "$@"
  tpu='' resources=("cpu: \"$cpu\"" "memory: \"$memory\"")
  if [ "${slice[workers]}" = all ]; then
    tpu=yes resources=("google.com/tpu: \"${slice[chips]}\"")
    [ "${slice[slices]}" -eq 1 ] || [ "${slice[hosts]}" -gt 1 ] ||
      fail "${slice[slices]} × ${slice[topology]}: GKE joins only slices of several hosts"
    say "for ${slice[slices]} × a node pool of ${slice[hosts]} ${slice[machine]}, topology ${slice[topology]}"
  fi
  connect
  write_bucket
  local there
  there=$(ask '' kubectl get jobset "$name" --ignore-not-found --output=name) ||
    fail "the cluster did not answer, or JobSet is not installed in it" 1
  [ -z "$there" ] || fail "there is a job $name already; follow or delete it, or take another name"
  undo=(delete)
  manifest | if [ "$dry_run" ]; then
    show kubectl apply --filename=-
    cat
  else
    kubectl apply --filename=-
  fi || fail "the cluster refused the job" 1
  undo=()
  follow
}

delete() {
  run kubectl delete "jobset/$name" "configmap/$name-gin" --ignore-not-found
}

# The log of the first pod, over restarts, until the job has ended.
follow() {
  local state message pods pod phase seen='' ended='' since='' silent=0
  following=yes
  while true; do
    if state=$(ask 'Completed 0' kubectl get jobset "$name" \
      --output='jsonpath={.status.terminalState} {.status.restarts}') &&
      pods=$(ask "$name-slice-0-0 Succeeded" kubectl get pods --sort-by=.metadata.creationTimestamp \
        --selector="jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0" \
        --output='jsonpath={range .items[*]}{.metadata.name} {.status.phase}{"\n"}{end}'); then
      silent=0
    else
      silent=$((silent + 1))
      [ $silent -lt 5 ] || fail "$name: there is no such job, or the cluster does not answer (5 tries)" 1
      pause 10
      continue
    fi
    read -r pod phase <<< "${pods##*$'\n'}" || true
    if [ "$pod $phase" != "$seen" ]; then
      [ -z "$pod" ] || say "$pod: $phase, restart ${state#* }"
      [ "$pod" = "${seen% *}" ] || ended='' since=''
      seen="$pod $phase"
    fi
    if [ "$pod" ] && [ "$phase" != Pending ] && [ -z "$ended" ]; then
      [ "$phase" = Running ] || ended=yes # then this is all of its log
      run kubectl logs "$pod" --container=pangu-tiny --follow ${since:+--since-time="$since"} || true
      since=$(TZ=UTC printf '%(%Y-%m-%dT%H:%M:%SZ)T')
    fi
    case $state in
      Completed*)
        say "done; delete it when its pods and their logs are no longer needed"
        return
        ;;
      Failed*)
        message=$(kubectl get jobset "$name" \
          --output='jsonpath={.status.conditions[?(@.type=="Failed")].message}') || true
        fail "$name failed after ${state#* } restarts: $message" 1
        ;;
    esac
    pause 10
  done
}

build() { # of what is committed
  need image
  need_tools git docker
  clone "$here/.."
  run docker build --platform=linux/amd64 --file="$scratch/clone/launch/Dockerfile" --tag="$image" "$scratch/clone" ||
    fail "the image was not built" 1
  run docker push "$image" || fail "$image was not pushed" 1
}

read_options "$@"
command=${words[0]:-} name=${words[1]:-}
case $command in
  start) start "${words[@]:2}" ;;
  follow | delete)
    connect
    "$command"
    ;;
  build) build ;;
  *) fail "unknown command '$command', expected start NAME STAGE FLAGS…, follow NAME, delete NAME or build" ;;
esac
