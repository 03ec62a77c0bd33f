#!/usr/bin/env bash
# What a GPU must show, in one run of nine minutes or less, from the project's root:
#
#     bash tests/gpu.sh            ($OUT: where the logs go, as one file gpu.tgz; default out/gpu)
#
# First everything at once: the tests, the default run, and the compilation of the layers, which is kept
# on disk. Then the timings, one after the other and alone. (Decoding compiles one block alone, and tries
# out its tiles meanwhile: it must not be disturbed.) Each part has its own time limit, and one that fails
# stops nothing.
OUT=${OUT:-out/gpu}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=2
set -m  # jobs in the background heed SIGINT, too

part() {  # part SECONDS NAME COMMAND...
  local limit=$1 name=$2 start=$SECONDS
  shift 2
  # SIGINT, at which pytest still says what has failed.
  timeout -s INT -k 10 "$limit" "$@" > "$OUT/$name.log" 2>&1
  echo "=== $name: exit $? after $((SECONDS - start)) s: $*" | tee -a "$OUT/$name.log"
}
LAYERS=(python3 tests/bench.py layers --device cuda --compile --transformers)
FLAGS=(--preset cumo-1b --max-length 2048 --micro-batch 3 --batch-size 12 --cuda-graphs)

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
python3 -c "import torch; print('torch', torch.__version__, 'CUDA', torch.version.cuda)"

# 1. Is it right? (-n: several processes, where pytest-xdist is there)
XDIST=$(python3 -c "import xdist" 2> /dev/null && echo "-n 6")
part 150 tests python3 -m pytest -q -rfE --tb=short --durations=8 $XDIST tests/test_cuda.py &
part 120 default python3 train.py --out "$OUT/tiny" --eval-questions 300 &
part 150 layers-compile "${LAYERS[@]}" --repeat 1 &
wait
rm -rf "$OUT"/tiny/stage* "$OUT"/tiny/*.safetensors "$OUT"/tiny/checkpoint*

# 2. How fast is it?
part 65 layers "${LAYERS[@]}" --repeat 3
part 130 decode python3 tests/bench.py decode cumo-mistral-7b
part 115 step python3 tests/bench.py step "${FLAGS[@]}" --steps 3
part 60 profile python3 tests/bench.py profile "${FLAGS[@]}"

for name in default layers decode step profile; do
  echo "--- $name"
  tail -c 1300 "$OUT/$name.log" | tr '\r' '\n' | tail -22
done
tail -c 4000 "$OUT/tests.log"
tar czf "$OUT/gpu.tgz" -C "$OUT" --remove-files tiny $(cd "$OUT" && ls ./*.log)
