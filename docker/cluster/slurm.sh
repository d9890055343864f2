#!/usr/bin/env bash
# One job over several nodes under Slurm: sbatch --nodes 2 --gpus-per-node 8 docker/cluster/slurm.sh JOB.json RUN_FOLDER
# The checkout, the environment and the run folder are on a file system that all nodes share.
#SBATCH --job-name=leap
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@120
set -euo pipefail
config=${1:?the job file}
output=${2:?the run folder, on a shared file system}

slots=${SLURM_GPUS_ON_NODE:-1} # ranks of a node
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
hosts=$(mktemp "$PWD/hosts.XXXXXX")
trap 'rm -f "$hosts"' EXIT
printf "%s slots=$slots\n" "${nodes[@]}" > "$hosts"

# one launcher a node, each told its place; no ssh between them
# shellcheck disable=SC2016  # SLURM_NODEID is expanded on the nodes
srun bash -c 'exec deepspeed --hostfile "$0" --no_ssh --node_rank "$SLURM_NODEID" --master_addr "$1" \
    --no_python leap-prune --config "$2" --output "$3"' "$hosts" "${nodes[0]}" "$config" "$output"
