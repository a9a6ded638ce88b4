# make setup   .venv with everything, at the tested versions (runs when one of the two files changes);
#              beside it, in .trt, two versions of TensorRT's Python bindings, for tests
# make demo    the whole method on the CPU, with the shipped model and generated images
# make test    every test that needs neither a GPU nor a data set
# make gpu     tests that need a CUDA device, then kernels, an epoch, and expansion at full size
# make check   ruff, pyright, import direction
# make bench-table   README's tables of figures from bench/results
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
DEMO_OUT ?= runs/demo
# Python bindings without the library: what our calls to TensorRT are held against.
TRT_BINDINGS := 10.16.1.11 11.4.0.106

# Wheels come from the package index, not from a local folder with other builds of torch in it.
export PIP_FIND_LINKS :=

.PHONY: setup bindings demo test gpu bench-table check
setup: $(INSTALLED) bindings

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 13) else "Python 3.11 to 3.13 is needed, this is %d.%d: make setup PYTHON=python3.12" % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,dev]'
	touch $@

# Per Python, as their extension is; tried again until they are there.
bindings: $(INSTALLED)
	@tag=$$($(BIN)/python -c 'import sys; print(sys.implementation.cache_tag)'); \
	for version in $(TRT_BINDINGS); do \
	  folder=.trt/$$tag/$$version; \
	  test -d $$folder || $(BIN)/python -m pip install --quiet --retries 1 --timeout 10 --no-deps \
	    --only-binary :all: --target $$folder tensorrt-cu13-bindings==$$version || \
	    { rm -rf $$folder; echo "no bindings of TensorRT $$version: tests that need them are skipped"; }; \
	done

demo: $(INSTALLED)
	$(BIN)/train --data shapes --model sdxl-tiny --method random rded upsample dace --seeds 3 \
	  --out $(DEMO_OUT) --overwrite

test: bindings
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# SDXL-Turbo's architecture with random weights: they decide neither speed nor memory.
GPU_BENCH = $(BIN)/python bench/bench_expand.py --model sdxl-turbo --weights random --device cuda \
  --images 128 --rounds 3 --json
gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu --require-gpu
	$(BIN)/python bench/bench_kernels.py --device cuda --json
	$(BIN)/python bench/bench_epoch.py --model sdxl-turbo --weights random --device cuda --size 224 --json
	$(GPU_BENCH) --size 224 --batch 32 --backends diffusers diffusers-compiled eager ort inductor
	$(GPU_BENCH) --size 224 --batch 64 --backends diffusers eager ort inductor
	$(GPU_BENCH) --size 512 --batch 32 --backends diffusers eager ort inductor

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/python tests/import_direction.py

bench-table: $(INSTALLED)
	$(BIN)/python bench/tables.py
