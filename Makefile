# `make test`, `make demo` and `make check` set up what they need in .venv and may be repeated at will.
PYTHON ?= python3
VENV := .venv
# Written last, so that an interrupted install is done again.
INSTALLED := $(VENV)/.installed
RUN := $(VENV)/bin/python
APP := .venv-app
# `make install TORCH=cpu` takes PyTorch's own build for CPUs, where PyPI's brings CUDA along on Linux.
TORCH ?= default
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Tiny models and several processes: more threads than this only get in each other's way.
TEST_THREADS ?= 1
TEST_WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install test test-app chaos check docs wheel demo bench gpu-check proof-gpu clean

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

install: $(INSTALLED)  ## Create .venv with the package, every extra and the development tools; TORCH=cpu without CUDA

$(INSTALLED): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, and '$(PYTHON)' is not: run 'make PYTHON=/path/to/python3.11'" >&2; exit 1; }
	@case "$(TORCH)" in default|cpu) ;; *) echo "TORCH=$(TORCH): expected cpu, or leave it out" >&2; exit 1;; esac
	@rm -f $@
	@$(VENV)/bin/pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
		{ echo "'$(PYTHON) -m venv' failed: install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "Installing the package and what it needs into $(VENV): some minutes the first time"
	@case "$(TORCH)-$$(uname -s)" in default-Linux) echo "About 7 GB, most of it CUDA; without a GPU: make install TORCH=cpu";; esac
	@[ "$(TORCH)" = default ] || \
		$(RUN) -m pip install --quiet --disable-pip-version-check torch torchvision --index-url $(TORCH_INDEX) || \
		{ echo "PyTorch for CPUs did not come from $(TORCH_INDEX): leave TORCH=cpu out, or give a mirror, TORCH_INDEX=URL" >&2; exit 1; }
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[all,dev]'
	@$(RUN) -c 'import torchvision' || \
		{ echo "torch and torchvision in $(VENV) are of different builds: rm -rf $(VENV), and install with another TORCH" >&2; exit 1; }
	@touch $@
	@echo "Done: 'source $(VENV)/bin/activate' brings unicoder-vl into this shell"

test: $(INSTALLED)  ## Run the tests; ARGS='-k name' goes to pytest
	OMP_NUM_THREADS=$(TEST_THREADS) $(RUN) -m pytest --numprocesses $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-app: $(APP)/.installed  ## Test the app in Chromium, where that is installed
	OMP_NUM_THREADS=$(TEST_THREADS) $(APP)/bin/python -m pytest -p no:xdist tests/test_app.py $(ARGS)

# Gradio wants an older Pillow than the rest is tested with: it lies before that of .venv.
$(APP)/.installed: $(INSTALLED)
	$(RUN) -m venv --clear $(APP)
	$(RUN) -c 'import site; print(*site.getsitepackages(), sep="\n")' > \
		"$$($(APP)/bin/python -c 'import site; print(site.getsitepackages()[0])')/venv.pth"
	$(APP)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[app]' 'selenium>=4.30,<5'
	@touch $@

chaos: $(INSTALLED)  ## Kill commands a hundred times and compare what they wrote: half an hour of one core; ARGS='--seed 1'
	$(RUN) tests/chaos/chaos.py $(ARGS)

check: $(INSTALLED)  ## Check style, formatting and types
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

docs: $(INSTALLED)  ## Build the site into site/; a link or a name that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

wheel: $(INSTALLED)  ## Build a wheel into dist/ and try it in an environment of its own; LIBRARIES=FOLDER downloads nothing for that
	rm -rf dist build
	$(RUN) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	TORCH=$(TORCH) TORCH_INDEX=$(TORCH_INDEX) LIBRARIES=$(LIBRARIES) .ci/try_wheel $(RUN)

demo: $(INSTALLED)  ## Pre-train a small model on rendered scenes and write demo/
	$(RUN) examples/run_demo.py

bench: $(INSTALLED)  ## Measure what scoring and training cost, into bench.json: 15 minutes of a quiet machine; ARGS='--rows memory'
	$(RUN) benchmarks/table.py $(ARGS)

gpu-check:  ## Test and measure on a GPU with what python3 holds, into gpu.json; ARGS='--device cpu --tiny' without one
	PYTHONPATH=src $(PYTHON) benchmarks/gpu_check.py $(ARGS)

proof-gpu:  ## Train and test on a GPU with what python3 holds, into proof/; ARGS='--inputs proof-inputs/1', see docs/proof.md
	PYTHONPATH=src $(PYTHON) benchmarks/proof_gpu.py $(ARGS)

clean:  ## Remove .venv, caches and what the demo wrote
	rm -rf $(VENV) $(APP) demo build dist site .pytest_cache .ruff_cache .mypy_cache src/*.egg-info
