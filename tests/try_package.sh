#!/usr/bin/env bash
# Install a wheel or a source distribution into an environment of its own and use it in an empty folder:
# tests/try_package.sh PYTHON dist/trl_perce-….whl
# The dependencies are those of the environment of PYTHON, which is slow to install anew; the package itself is not.
set -euo pipefail
python=$(realpath -s "$1") package=$(realpath "$2")
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
# A path file adds the dependencies behind the new environment's own packages; the editable install is not among them
"$python" -c 'import site; print(site.getsitepackages()[0])' > "$folder/dependencies.pth"
cp "$folder/dependencies.pth" "$("$folder/venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')/"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall "$package"
model=$("$python" "$root/examples/smollm2.py" | tail -n 1)
mkdir "$folder/empty" && cd "$folder/empty"
"$folder/venv/bin/python" -c 'import sys, trl_perce; sys.exit(not trl_perce.__file__.startswith(sys.argv[1]))' "$folder/venv" \
    || { echo "$package: another trl_perce is imported"; exit 1; }
"$folder/venv/bin/trl-perce" train --config recipes/SmolLM2-135M-Instruct/persona_qa/config_lora.yaml \
    --model_name_or_path "$model" --max_steps 2 --eval_strategy no --output_dir adapter > log.txt 2>&1 || { cat log.txt; exit 1; }
test -f adapter/adapter_model.safetensors
echo "$(basename "$package") installs, and trains with the recipe that comes with it"
