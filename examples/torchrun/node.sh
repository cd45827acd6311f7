#!/bin/bash
# One node of a run on several, by torchrun. Call it on every node, with the same address and its own number:
#
#   NODES=2 NODE=0 ADDRESS=node0:29500 examples/torchrun/node.sh --model.policy=gpt2
#   NODES=2 NODE=1 ADDRESS=node0:29500 examples/torchrun/node.sh --model.policy=gpt2
#
# All nodes must see the run folder. A node that dies ends the others; the same commands go on from where they were.
set -euo pipefail
NODES=${NODES:-1} NODE=${NODE:-0} PROCESSES=${PROCESSES:-8} ADDRESS=${ADDRESS:-127.0.0.1:29500}

exec python3 -m torch.distributed.run \
  --nnodes="$NODES" --node_rank="$NODE" --nproc_per_node="$PROCESSES" \
  --master_addr="${ADDRESS%:*}" --master_port="${ADDRESS##*:}" \
  -m lightning_rlhf fit \
  --config dpo_online --config trainer/ddp \
  --trainer.num_nodes="$NODES" --trainer.devices="$PROCESSES" \
  --run_dir="${RUN_DIR:-runs/torchrun}" \
  "$@"
