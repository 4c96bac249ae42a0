#!/usr/bin/env bash
# Train on a Cloud TPU slice, from the machine where gcloud is set up:
#
#   export NAME=pod ZONE=us-west4-a TYPE=v5litepod-256
#   scripts/tpu_pod.sh create                  # VERSION=v2-alpha-tpuv5-lite, SPOT=1 for a spot slice
#   scripts/tpu_pod.sh install                 # the last commit, with [tpu], on every host
#   scripts/tpu_pod.sh launch scripts/pretrain.py configs/bert_base.py --mesh.fsdp 16
#   scripts/tpu_pod.sh follow                  # the output of host 0; Ctrl-C leaves the run alone
#   scripts/tpu_pod.sh stop                    # SIGTERM: all hosts save at one step and exit
#   scripts/tpu_pod.sh collect /mnt/jaxlm/runs/bert_base runs  # from host 0 into a folder here
#   scripts/tpu_pod.sh delete
#
# The same launch resumes a run that was stopped or preempted; a slice that had to be created again
# needs install first. All hosts must see one run folder: on more than one host give install
# NFS=SERVER:/SHARE, such as a Filestore's, which it mounts at /mnt/jaxlm, now and after a reboot,
# and launch with --runs /mnt/jaxlm/runs. Data may be there, too, or on every host.
set -euo pipefail

case ${1:-help} in
  create | install | launch | follow | stop | collect | delete) ;;
  *)
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
    [ "${1:-help}" = help ] && exit
    echo "error: $1 is none of these actions" >&2
    exit 2
    ;;
esac
: "${NAME:?name the slice, such as NAME=pod}" "${ZONE:?such as ZONE=us-west4-a}"
tpu() { gcloud compute tpus tpu-vm "$@" --zone "$ZONE" ${PROJECT:+--project "$PROJECT"}; }
everywhere() { tpu ssh "$NAME" --worker=all --command "$1"; }
quoted() { printf '%q ' "$@"; }

action=$1
shift
case $action in
  create)
    : "${TYPE:?such as TYPE=v5litepod-16}"
    tpu create "$NAME" --accelerator-type "$TYPE" \
      --version "${VERSION:-v2-alpha-tpuv5-lite}" ${SPOT:+--spot}
    ;;
  install)
    archive=$(mktemp --suffix .tar.gz)
    trap 'rm -f "$archive"' EXIT
    git archive --format tar.gz --output "$archive" HEAD
    tpu scp "$archive" "$NAME:jaxlm.tar.gz" --worker=all
    everywhere "${NFS:+sudo apt-get install -y nfs-common && sudo mkdir -p /mnt/jaxlm && \
      (grep -q ' /mnt/jaxlm ' /etc/fstab || \
        echo '$NFS /mnt/jaxlm nfs defaults,nofail 0 0' | sudo tee -a /etc/fstab) && \
      (mountpoint -q /mnt/jaxlm || sudo mount /mnt/jaxlm) && sudo chmod a+rwx /mnt/jaxlm && }\
      mkdir -p jaxlm && tar xzf jaxlm.tar.gz -C jaxlm && cd jaxlm && \
      (command -v uv || python3 -m pip install -q uv) && export PATH=\$HOME/.local/bin:\$PATH && \
      (test -d .venv || uv venv -q --python 3.12 .venv) && uv pip install -q -p .venv -e '.[tpu]'"
    ;;
  launch)
    [ $# -gt 0 ] || { echo "error: launch what? such as: launch scripts/pretrain.py CONFIG" >&2; exit 2; }
    everywhere "cd jaxlm && if pkill -0 -F run.pid python 2> /dev/null; then \
        echo error: a run is in progress: stop it first >&2; exit 1; fi; \
      { nohup .venv/bin/python $(quoted "$@")>> run.log 2>&1 < /dev/null & echo \$! > run.pid; }"
    ;;
  follow) tpu ssh "$NAME" --worker=0 --command "tail -n 100 -F jaxlm/run.log" ;;
  stop) tpu ssh "$NAME" --worker=0 --command "pkill -TERM -F jaxlm/run.pid python" ;;
  collect)
    [ $# -eq 2 ] || { echo "error: collect what, and where to? such as: collect /mnt/jaxlm/runs/x runs" >&2; exit 2; }
    mkdir -p "$2"
    case $1 in /*) from=$1 ;; *) from=jaxlm/$1 ;; esac
    tpu scp --recurse "$NAME:$from" "$2" --worker=0
    ;;
  delete) tpu delete "$NAME" ;;
esac
