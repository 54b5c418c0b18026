#!/usr/bin/env bash
# Everything that a GPU should run, in stages of under ten minutes each; what a stage prints and measures goes to $OUT.
#
#   OUT=results benchmarks/gpu.sh                              all stages
#   OUT=results STAGES="many wire" benchmarks/gpu.sh           some of them
#   OUT=results STAGES="tests two_networks" benchmarks/gpu.sh  only if asked for: the tests that need an accelerator, and
#                                                              recipes/two_networks.yaml with 25 times as much task loss
#   OUT=results TINY=1 DEVICE=cpu benchmarks/gpu.sh            a try on a CPU, a few minutes
#
# Resumable: a stage that ended well leaves $OUT/STAGE.done and is not run again; a failed one does not stop the
# others, and the exit status is the number of failed ones. (`two_networks` goes on from its resume points.)
# PYTHON names the interpreter, GENERATOR a generator's folder (runs/demo/generator), RECIPE one whose runs are
# collected (recipes/demo.yaml), START the adapter that the runs of `many` begin with (default: a fresh one).
set -u
cd "$(dirname "$0")/.."
: "${OUT:?names the folder that results go to}" "${PYTHON:=python}" "${DEVICE:=cuda}" "${TINY:=}"
: "${STAGES:=many many_float32 generation training codec store wire recorder}"
: "${GENERATOR:=runs/demo/generator}" "${START:=}" "${STORE:=runs/demo/trajectories}" "${RECIPE:=recipes/demo.yaml}"
LIMIT=590 # seconds of a stage
mkdir -p "$OUT"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
start=(${START:+--start "$START"})
if [ -n "$TINY" ]; then
    many=(--tasks 2 --examples 4 --collect.single.steps=2 --collect.rows=8) batches=(1 2) widths=(8) training=(--steps 2)
    store=(--gigabytes 0.01 --layers 2 --width 8) recorder=(--pairs 1 --steps 2 --settings trainer)
    scale=(--suite.train=24 --suite.validation=2 --collect.rows=4 --train.steps=2 --train.origin_steps=2
        --train.task_loss.steps=2 --train.task_loss.alone_steps=2)
else
    scale=(--suite.validation=40 --collect.rows=96 --collect.multi_task.batch_size=64 --train.origin_steps=2500
        --train.validate_every=1000 --train.checkpoint_every=500 --train.task_loss.steps=2000
        --train.task_loss.alone_steps=2000 --train.task_loss.tasks=32 --train.task_loss.examples=8)
    many=(--tasks 16 --collect.together=16) batches=(1 32 100) widths=(16 64 128) training=(--steps 100 --compile)
    store=(--gigabytes 20) recorder=()
fi

bench() { # name, script, its options
    local name=$1 script=$2
    shift 2
    timeout "$LIMIT" "$PYTHON" "benchmarks/$script" "$@" --device "$DEVICE" --out "$OUT/$name.json"
}

stage_many() { bench many_at_once many_at_once.py "${many[@]}" "${start[@]}"; }
stage_many_float32() { bench many_at_once_float32 many_at_once.py "${many[@]}" --base.dtype=float32 "${start[@]}"; }
stage_generation() { bench generation generation.py "$GENERATOR" --batches "${batches[@]}"; }
stage_training() { bench generator_training generator_training.py "$RECIPE" "${training[@]}"; }
stage_codec() { bench codec codec_error.py "$STORE" --widths "${widths[@]}"; }
stage_store() { bench large_store large_store.py --folder "$OUT" "${store[@]}"; }
stage_wire() { bench wire wire.py; }
stage_tests() { timeout "$LIMIT" "$PYTHON" -m pytest -q tests/test_accelerator.py; }
stage_two_networks() {
    local run=$OUT/two_networks
    timeout "$LIMIT" "$PYTHON" recipes/train_generator.py recipes/two_networks.yaml --output="$run" "${scale[@]}" &&
        { [ -e "$run/small" ] || "$PYTHON" -m ltdi_peft.cli shrink "$run/generator" --out "$run/small"; }
}
stage_recorder() { timeout "$LIMIT" "$PYTHON" benchmarks/recorder_overhead.py "${recorder[@]}"; }

failed=0
for stage in $STAGES; do
    if ! declare -F "stage_$stage" >/dev/null; then
        echo "unknown stage $stage" >&2
        exit 64
    fi
    [ -e "$OUT/$stage.done" ] && continue
    began=$SECONDS
    if "stage_$stage" >"$OUT/$stage.txt" 2>"$OUT/$stage.err"; then
        touch "$OUT/$stage.done"
        echo "$stage: done in $((SECONDS - began)) s"
    else
        echo "$stage: FAILED with status $? after $((SECONDS - began)) s, see $OUT/$stage.err" >&2
        failed=$((failed + 1))
    fi
done
exit "$failed"
