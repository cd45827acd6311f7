#!/bin/bash
# One node of a run on several, by torchrun. Call it on every node, with the same address and its own number:
#
#   NODES=2 NODE=0 ADDRESS=node0:29500 examples/torchrun/node.sh --model.policy=gpt2
#   NODES=2 NODE=1 ADDRESS=node0:29500 examples/torchrun/node.sh --model.policy=gpt2
#
# All nodes must see the run folder. A node that dies ends the others; the same commands go on from where they were.
# With RESTARTS=3 the others wait up to WAIT seconds for a node that replaces it, by the command of any node but the one
# of ADDRESS, and all go on from the last checkpoint; so up to three times. The node of ADDRESS must live: it holds the
# list of nodes. NODE is not needed then.
set -euo pipefail
NODES=${NODES:-1} NODE=${NODE:-0} PROCESSES=${PROCESSES:-8} ADDRESS=${ADDRESS:-127.0.0.1:29500}
RESTARTS=${RESTARTS:-0} WAIT=${WAIT:-600}

if [ "$RESTARTS" -gt 0 ]; then
  # else torchrun (2.13) keeps the address of rank zero from the first start, and a new node waits for it in vain
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  meeting=(--rdzv_backend=c10d --rdzv_endpoint="$ADDRESS" --rdzv_id=lightning_rlhf --rdzv_conf="join_timeout=$WAIT"
    --max_restarts="$RESTARTS")
else
  meeting=(--node_rank="$NODE" --master_addr="${ADDRESS%:*}" --master_port="${ADDRESS##*:}")
fi

exec python3 -m torch.distributed.run \
  --nnodes="$NODES" --nproc_per_node="$PROCESSES" "${meeting[@]}" \
  -m lightning_rlhf fit \
  --config dpo_online --config trainer/ddp \
  --trainer.num_nodes="$NODES" --trainer.devices="$PROCESSES" \
  --run_dir="${RUN_DIR:-runs/torchrun}" \
  "$@"
