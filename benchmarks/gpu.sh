#!/bin/sh
# All benchmarks that have a --device, one after the other, in at most ten minutes; prints a table of each.
#
#     benchmarks/gpu.sh                          on a GPU, with the model of 6 M parameters
#     benchmarks/gpu.sh --model FOLDER           another model, such as SmolLM2 or a 7B one in a folder
#     benchmarks/gpu.sh --device cpu --quick     a dry run of a few minutes, to see that everything starts
#     benchmarks/gpu.sh --out FILE               also appends each result to a file, a line of JSON
#     benchmarks/gpu.sh --only "head judge"      some of them
#
# One that fails or takes longer than its share of the time is named, and the next one runs.
set -u
cd "$(dirname "$0")/.." || exit 1

device=cuda model=small quick=no out= only=
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=$2; shift 2 ;;
        --model) model=$2; shift 2 ;;
        --out) out=$2; shift 2 ;;
        --only) only=" $2 "; shift 2 ;;
        --quick) quick=yes; shift ;;
        *) sed -n '2,/^set/{/^#/p;}' "$0" >&2; exit 2 ;;
    esac
done
PYTHON=${PYTHON:-python}
PYTHONPATH=${PYTHONPATH:-.}
export PYTHONPATH

if [ "$device" = cuda ]; then
    # seconds of each of the seven benchmarks, beside 30 for the limits of the device
    share=80
    # vocabulary, width and tokens of an 8B model; rows fill the device
    head="--vocabulary 128256 --width 4096 --tokens 4096" common="--repeats 2 --steps 5 --skip 2"
    train="--batch 32" sample="--batch 32 --new-tokens 128"
else
    share=900
    head="" common="--repeats 1 --steps 1 --skip 1" train="--batch 4" sample="--batch 4 --new-tokens 16"
fi
if [ "$quick" = yes ]; then
    head="--vocabulary 8192 --batches 1 --repeats 1" common="--repeats 1 --steps 1 --skip 0"
    train="--batch 2" sample="--batch 4 --new-tokens 4"
fi

failed=
limits=$(timeout "$((share / 8 + 20))" "$PYTHON" -m benchmarks.head --limits --device "$device") || { echo "no $device here" >&2; exit 1; }
echo "limits of the device: $limits"
peak=$(printf %s "$limits" | sed 's/.*"float32_tflops": \([0-9.]*\).*/\1/')

run() {
    name=$1
    shift
    case ${only:- $name } in *" $name "*) ;; *) return ;; esac
    printf '\n## %s %s\n\n' "$name" "$*"
    # the last lines of an error say what it was
    log=$(mktemp)
    timeout "$share" "$PYTHON" -m "benchmarks.$name" --device "$device" "$@" ${out:+--out "$out"} 2>"$log" ||
        { failed="$failed $name"; echo "failed or took longer than $share s:"; tail -n 5 "$log"; }
    rm -f "$log"
}

# options are words: no quotes
# shellcheck disable=SC2086
{
    run head $head
    run dpo_step --model "$model" $common $train --peak-tflops "$peak"
    run reward_step --model "$model" $common $train --peak-tflops "$peak"
    run judge --model "$model" --repeats 1 $train --peak-tflops "$peak"
    run generation --model "$model" $common $sample
    run online_round --model "$model" $common $sample
    run rl_step --model "$model" $common $sample
}
[ -z "$failed" ] || { printf '\nnot complete:%s\n' "$failed"; exit 1; }
