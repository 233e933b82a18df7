PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PREFUSE_DATA ?= $(if $(wildcard ../shared/data),$(abspath ../shared/data))

.PHONY: install demo test test-full gpu lint clean

install: $(VENV)/.installed  ## .venv with prefuse (editable), its C++ extension and the dev tools

$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	mkdir -p .links/prefuse && ln -sfn ../../kernels .links/prefuse/kernels
	ln -sfn ../../trainer .links/prefuse/trainer
	touch $@

$(VENV)/.peers: $(VENV)/.installed
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,peers]'
	touch $@

demo: install  ## SFT, DPO and GRPO of a tiny model on a generated task; ends with a table and a plot
	$(BIN)/prefuse demo --output_dir runs/demo

test: install  ## at most 12 minutes on 2 cores, no GPU needed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not full" -n 2 --dist loadfile --durations=20

test-full: $(VENV)/.peers  ## adds the slower proofs and the parity tests against the peers
	$(BIN)/python -m pytest

# the Python that is there, for a GPU machine may have no way to install one
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
BUILT = import torch; print(torch.cuda.get_device_name()); from prefuse.kernels import _C; \
	assert _C.has_cuda, "built without nvcc"

gpu:  ## on a machine with a GPU: its tests, then compute-sanitizer
	$(GPU_PYTHON) setup.py build_ext --inplace
	cd tests && $(GPU_PYTHON) -c 'import conftest; $(BUILT)'
	OMP_NUM_THREADS=2 $(GPU_PYTHON) -m pytest -m gpu -n 8 --dist worksteal --durations=20
	$(GPU_PYTHON) tests/sanitize.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) build runs .links kernels/_C*.so *.egg-info
