#!/usr/bin/env bash
# Trains on a slice of Cloud TPU VMs until it is done, through preemptions.
#
#   REPO=https://github.com/YOU/cv_jax CONFIG=configs/cifar10.py WORKDIR=gs://BUCKET/cifar10 \
#     bash launch/tpu_vm.sh
#
# Before: `gcloud auth login`, `gcloud config set project PROJECT`, TPU quota in the zone, and a bucket
# that the TPU's service account may write. The loop runs here: use a machine that stays up. The script
# deletes the slice when training is done; if it ends earlier, it prints the command that deletes the slice.
# To stop with a checkpoint and free the slice:
#   gcloud compute tpus tpu-vm ssh cv-jax --zone=ZONE --worker=all --command='pkill -f train.py'
#   gcloud compute tpus queued-resources delete cv-jax --zone=ZONE --force
set -euo pipefail

: "${CONFIG:?set a config file, such as configs/cifar10.py}"
: "${WORKDIR:?set a directory in a bucket, such as gs://BUCKET/cifar10}"
: "${REPO:?set the repository that the workers clone, such as https://github.com/YOU/cv_jax}"
REVISION=${REVISION:-main}                # better: a commit, so that a restart runs the same code
ZONE=${ZONE:-us-west4-a}
NAME=${NAME:-cv-jax}
ACCELERATOR=${ACCELERATOR:-v5litepod-16}  # 16 chips of v5e: 4 hosts with 4 chips each
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}   # image of v5e; v2-alpha-tpuv5 for v5p, v2-alpha-tpuv6e for v6e
SPOT=${SPOT---spot}                       # SPOT= for a slice that is not preempted
POLL=${POLL:-60}                          # seconds between two looks at the slice

# A slice costs money once it is requested, so all settings are checked before.
fail() { echo "tpu_vm.sh: $1" >&2; exit 2; }
case $WORKDIR in
  gs://?*) ;;
  *) fail "WORKDIR=$WORKDIR must be gs://BUCKET/PATH: directories on the slice are deleted with it." ;;
esac
for program in gcloud git; do
  command -v "$program" >/dev/null || fail "$program is missing: install it on this machine."
done
GIT_TERMINAL_PROMPT=0 git ls-remote "$REPO" >/dev/null ||
  fail "REPO=$REPO cannot be cloned: correct it, see git's message above."

request() { gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"; }
state() { request describe --format='value(state.state)' 2>/dev/null || echo NONE; }
on_all_workers() { gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"; }

# The image's Python is too old, so uv brings one; gcsfs opens gs://.
install="test -d cv_jax || git clone -q '$REPO' cv_jax; cd cv_jax && git checkout -q '$REVISION' &&
  python3 -m pip install -q --user uv && python3 -m uv venv -q --allow-existing --python 3.13 .venv &&
  python3 -m uv pip install -q -r requirements-tpu.txt gcsfs"
train="cd cv_jax && .venv/bin/python train.py --config='$CONFIG' --workdir='$WORKDIR'"

say_what_is_left() {
  echo "tpu_vm.sh: the slice $NAME may still exist and cost money. Delete it with:" >&2
  echo "  gcloud compute tpus queued-resources delete $NAME --zone=$ZONE --force" >&2
}
trap say_what_is_left EXIT
trap 'exit 129' HUP
trap 'exit 130' INT # after Ctrl-C gcloud may exit as after an error of its own
trap 'exit 143' TERM

while true; do
  case $(state) in
    NONE) request create --node-id="$NAME" --accelerator-type="$ACCELERATOR" \
      --runtime-version="$RUNTIME" ${SPOT:+"$SPOT"} ;;
    SUSPENDED) request delete --force --quiet ;; # a preempted slice does not come back
    FAILED)
      request describe
      exit 1
      ;;
    ACTIVE)
      on_all_workers "$install" && on_all_workers "$train" && break
      sleep "$POLL"
      # An active slice was not preempted: the command failed, and printed its error above.
      [ "$(state)" != ACTIVE ] || exit 1
      ;;
    *) sleep "$POLL" ;; # waiting, being created, being deleted
  esac
done
request delete --force --quiet
trap - EXIT
