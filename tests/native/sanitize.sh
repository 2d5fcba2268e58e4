#!/bin/bash
# Memory errors, races and barriers of every kernel family on small cases, with CUDA's compute-sanitizer, on a
# machine with a GPU, from the project's folder: tests/native/sanitize.sh [the tests' binary]. Ends with 1
# where a tool finds anything or a test fails or is not there.
set -u
tests=${1:-build/rodin_native_tests}
cases=(
  'attention, one head, blocks of 8'
  'attention, 40 heads, two tokens'
  'attention, V3 heads'
  'attention, 3 heads, FP8 cache'
  'attention, prompts, FP8 cache'
  'attention, odd sizes fp8'
  'attention, 132 sequences of one length'
  'gqa of 6 heads'
  'joined attention, 3 heads, few rows'
  'joined attention, one head, one token'
  'linear 72x136'
  'linear 5x13'
  'linear 331x200 fp8, odd scale blocks'
  'pair and gated, odd sizes fp8'
  'split linear 6400x16'
  'quantised linear 64x128'
  'quantised moe, odd widths'
  'moe, odd sizes fp8'
  'moe, group_limited_greedy f16'
  'route breaks ties'
  'rms_norm'
  'embed, gather_rows'
  'sample: NaN'
)
# Racecheck does not follow what orders these (cuda/SPEED.md, "One token").
not_for_racecheck=(
  'joined moe, softmax'
  'joined moe, one chosen'
)
failed=0
for tool in memcheck racecheck synccheck; do
  start=$SECONDS
  these=("${cases[@]}")
  [ "$tool" = racecheck ] || these+=("${not_for_racecheck[@]}")
  if compute-sanitizer --tool "$tool" --error-exitcode 3 --print-limit 10 "$tests" "${these[@]/#/cuda: }"; then
    echo "$tool: clean, $((SECONDS - start)) s"
  else
    echo "$tool: FAILED, $((SECONDS - start)) s"
    failed=1
  fi
done
exit $failed
