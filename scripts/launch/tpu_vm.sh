#!/bin/bash
# One training run on all hosts of a Cloud TPU slice. See docs/multiprocess.md.
#
#   NAME=my-tpu ZONE=us-central2-b CONFIG=configs/imagenet.py:mlp_spe_t WORKDIR=/mnt/shared/runs/mlp_spe_t \
#       scripts/launch/tpu_vm.sh setup
#   (the same variables)  scripts/launch/tpu_vm.sh train --config.data_dir=/mnt/shared/imagenet
#   (the same variables)  scripts/launch/tpu_vm.sh stop
#
# setup   copies this repository to every host and installs it there with JAX for TPUs
# train   runs train.py on every host and shows what they say; what follows goes to train.py
# stop    asks the run to save its state and end; `train` again continues it
#
# Variables:
#   NAME, ZONE   the TPU VM (required); PROJECT: its project (default: gcloud's)
#   CONFIG       what to train, as for train.py --config (required by train)
#   WORKDIR      a folder that all hosts see, such as a mounted Filestore or bucket (required by train)
#   FOLDER       where the repository lies on the hosts, below the home folder (default: spiking_mlp_jax)
#   PYTHON       the hosts' Python, 3.11 or newer (default: python3)
#   TIMEOUT      seconds of silence after which a process counts as dead (default: 60)

set -euo pipefail

: "${NAME:?name the TPU VM: NAME=my-tpu}"
: "${ZONE:?name its zone: ZONE=us-central2-b}"
FOLDER="${FOLDER:-spiking_mlp_jax}"
PYTHON="${PYTHON:-python3}"
TIMEOUT="${TIMEOUT:-60}"
where=(--zone "$ZONE")
if [[ -n "${PROJECT:-}" ]]; then
    where+=(--project "$PROJECT")
fi

usage() {
    echo "usage: NAME=... ZONE=... $0 setup | train [arguments of train.py] | stop" >&2
    exit 2
}

on_all_hosts() {
    gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command "$1"
}

setup() {
    local archive
    archive="$(mktemp -d)/repository.tar.gz"
    git -C "$(dirname "$0")/../.." archive --format=tar.gz --output="$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$NAME:repository.tar.gz" "${where[@]}" --worker=all
    # The lock file's jax stays; its TPU extra only adds the TPU's library.
    on_all_hosts "set -e; mkdir -p '$FOLDER'; tar -xzf repository.tar.gz -C '$FOLDER'; cd '$FOLDER'
        $PYTHON -m venv .venv
        .venv/bin/python -m pip install --quiet -r requirements.lock
        .venv/bin/python -m pip install --quiet --no-deps -e .
        .venv/bin/python -m pip install --quiet \"jax[tpu]==\$(.venv/bin/python -c 'import jax; print(jax.__version__)')\""
}

train() {
    : "${CONFIG:?name what to train: CONFIG=configs/imagenet.py:mlp_spe_t}"
    : "${WORKDIR:?name a folder that all hosts see: WORKDIR=/mnt/shared/runs/name}"
    # Quoted once more, because a shell of the hosts reads it.
    on_all_hosts "cd '$FOLDER' && exec .venv/bin/python -u train.py $(
        printf '%q ' --config "$CONFIG" --workdir "$WORKDIR" --timeout "$TIMEOUT" "$@"
    )"
}

stop() {
    # The brackets keep pkill from finding the shell that runs it. One process is enough: it tells the others.
    gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=0 --command "pkill -TERM -f '[t]rain.py --config'"
}

case "${1:-}" in
setup | train | stop) "$@" ;;
*) usage ;;
esac
