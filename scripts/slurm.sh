#!/usr/bin/env bash
# Train on a SLURM cluster, one process for each GPU:
#
#   sbatch --nodes 4 --ntasks-per-node 8 --gpus-per-node 8 \
#     scripts/slurm.sh scripts/pretrain.py configs/bert_base.py --mesh.fsdp 8
#
# Submit the same again to resume. Two minutes before its time is over all processes save at one step
# and exit, and the job is put into the queue again. The run folder must be on a disk that all
# nodes share; VENV says where jaxlm is installed.
#SBATCH --job-name jaxlm
#SBATCH --output %x-%j.log
#SBATCH --time 12:00:00
#SBATCH --signal SIGTERM@120
#SBATCH --requeue
#SBATCH --open-mode append
set -euo pipefail

[ $# -gt 0 ] || { sed -n '2,/^#SBATCH/{/^# /s/^# //p}' "$0"; exit 2; }
source "${VENV:-.venv}/bin/activate"
export PYTHONUNBUFFERED=1
srun python "$@"
# A run that ended early was stopped by the signal: resume when there is room.
for _ in 1 2 3 4 5; do # the controller may be busy
  left=$(squeue --noheader --job "$SLURM_JOB_ID" --format %L) && break
  sleep 5
done
case ${left:-} in
  0:?? | 1:?? | 2:??) scontrol requeue "$SLURM_JOB_ID" ;;
esac
