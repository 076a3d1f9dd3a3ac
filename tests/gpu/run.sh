#!/usr/bin/env bash
# Tests and measures the engine on a machine with an NVIDIA driver, from a pack that `make gpu-pack` made.
#
#   bash run.sh [check] [sanitize] [bench] [kernels] [startup] [serve] [peers]      the first four without an argument; results in ./out
#
# check      every kernel against its plain reference, then the models against their goldens
# sanitize   memcheck and racecheck over small shapes, where compute-sanitizer is installed
# bench      the card's ceilings (where torch is), then the workloads of docs/perf.md
# kernels    each kernel of a step by itself, beside its floor
# startup    makes 17 GB of files with torch, and times the engine from its start to the first token
# serve      makes 2.5 GB of files with torch, serves them over HTTP, and drives the server in closed and open loops
# peers      makes 20 GB of files with torch, and has LMDeploy take the workloads of `bench` on this card, where it is installed
set -uo pipefail
cd "$(dirname "$0")"
mkdir -p out
export PLIMSOLL_TESTS=$PWD/data
parts=${*:-check sanitize bench kernels}
failed=0

say() { printf '\n== %s\n' "$*"; }

if [[ " $parts " == *" check "* ]]; then
    for binary in tests/*; do
        say "$binary"
        timeout 240 "$binary" --nocapture >"out/$(basename "$binary").log" 2>&1 || { failed=1; echo FAILED; }
        grep -E 'test result|panicked|FAILED|left out|^on ' "out/$(basename "$binary").log" | head -20
    done
fi

if [[ " $parts " == *" check "* ]]; then
    say 'held-out questions, over HTTP'
    timeout 120 python3 heldout.py bin/plimsoll-engine data || { failed=1; echo FAILED; }
fi

# sanitized TOOL BINARY FILTER: fails without the tool's own verdict, and says when there was none in time.
sanitized() {
    local tool=$1 binary=$2 filter=$3 log verdict
    log=out/$tool-$(basename "$binary")-$filter.log
    say "$tool $binary $filter"
    timeout 120 compute-sanitizer --tool "$tool" --error-exitcode 9 "$binary" "$filter" >"$log" 2>&1
    local status=$?
    grep -E 'test result' "$log"
    verdict=$(grep -E '(ERROR|RACECHECK) SUMMARY' "$log") || verdict="no verdict (exit status $status)"
    echo "$verdict"
    [[ $status == 0 && $verdict == *SUMMARY* ]] || { failed=1; echo FAILED; }
}

if [[ " $parts " == *" sanitize "* ]]; then
    if command -v compute-sanitizer >/dev/null; then
        for binary in tests/kernels-*; do
            sanitized memcheck "$binary" small_shapes_for_the_memory_checker
            if [[ $binary == *-gemm_stream ]]; then
                # Where blocks share a K, racecheck gives no verdict in any time that was tried.
                sanitized racecheck "$binary" one_tile_of_eight_tokens_for_the_race_checker
                sanitized racecheck "$binary" one_tile_of_sixty_four_tokens_for_the_race_checker
            else
                sanitized racecheck "$binary" small_shapes_for_the_memory_checker
            fi
        done
    else
        failed=1
        echo 'sanitize: FAILED: compute-sanitizer is not installed'
    fi
fi

ceilings=()
if [[ " $parts " == *" bench "* || " $parts " == *" kernels "* ]] && python3 -c 'import torch' 2>/dev/null; then
    python3 ceilings.py | tee out/ceilings.json
    ceilings=($(python3 -c 'import json; c = json.load(open("out/ceilings.json"))
print("--read-tbps", c["read_TBps_sum"], "--bf16-tflops", c["bf16_TFLOPs_8192"])'))
fi

if [[ " $parts " == *" bench "* ]]; then
    for model in llama-3.2-1b llama-3.1-8b; do
        say "bench $model"
        bin/plimsoll-engine bench --random-weights "$model" "${ceilings[@]}" --json >"out/$model.json" 2>"out/$model.log" || { failed=1; echo FAILED; }
        cat "out/$model.log"
    done
fi

if [[ " $parts " == *" kernels "* ]]; then
    for model in llama-3.2-1b llama-3.1-8b; do
        say "bench kernels $model"
        timeout 240 bin/plimsoll-engine bench kernels "$model" "${ceilings[@]}" --json "out/kernels_$model.json" \
            2>"out/kernels_$model.log" || { failed=1; echo FAILED; tail -3 "out/kernels_$model.log"; }
    done
fi

if [[ " $parts " == *" startup "* ]]; then
    say 'from process start to the first token of an 8B model'
    timeout 240 python3 startup.py bin/plimsoll-engine data "${TMPDIR:-/tmp}" | tee out/startup.json || { failed=1; echo FAILED; }
fi

if [[ " $parts " == *" serve "* ]]; then
    say 'a 1B model over HTTP'
    timeout 300 python3 serve.py bin/plimsoll-engine data llama-3.2-1b "${TMPDIR:-/tmp}" out || { failed=1; echo FAILED; }
fi

if [[ " $parts " == *" peers "* ]]; then
    for model in llama-3.2-1b llama-3.1-8b; do
        say "LMDeploy, $model"
        timeout 240 python3 peer_lmdeploy.py data "$model" "${TMPDIR:-/tmp}" "out/lmdeploy_$model.json" 2>"out/lmdeploy_$model.log" || { failed=1; echo FAILED; }
    done
fi

[ "$failed" = 0 ] && echo 'all passed' || echo 'something FAILED'
exit "$failed"
