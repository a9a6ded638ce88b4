# make setup   .venv with everything, at the tested versions (runs when one of the two files changes);
#              and in it TensorRT for RTX, which builds engines without a GPU; beside it, for tests, in .trt two versions of TensorRT's Python bindings, and in .ddranking
#              DD-Ranking, which by its own word cannot be installed beside numpy 2
# make install .venv with what users need, without tests and tools
# make setup-browser   what tests of the report need, as root: Chromium, and by npm axe-core in .browser
# make demo    after make install: the whole method on the CPU, with the shipped model and generated images
# make test    every test that needs neither a GPU nor a data set
# make gpu     tests that need a CUDA device, kernels, expansion at full size, an epoch, scoring: under
#              8 minutes. FULL=1: more rounds, and the backends that compile. STAGES="tests expand-512":
#              only these. DATA=DIR: images to score. OUT=DIR: rows and logs. Installs nothing: it runs
#              .venv where make setup has made it, else PYTHON, and with VENV= PYTHON always. DRY=1: a
#              rehearsal on the CPU, after make setup
# make gpu-wheels   what `make gpu` needs beside torch, transformers and other usual libraries, in the
#              folder WHEELS, for Python WHEELS_PYTHON; fails above WHEELS_KIB
# make check   ruff, pyright, import direction
# make bench-table   the tables of bench/README.md, from bench/results
PYTHON ?= python3
VENV := .venv
BIN := .venv/bin
INSTALLED := .venv/.installed
TESTABLE := .venv/.testable
DEMO_OUT ?= runs/demo
OUT ?= runs/gpu
# Python bindings without the library: what our calls to TensorRT are held against.
TRT_BINDINGS := 10.16.1.11 11.4.0.106
# DD-Ranking and what it imports that .venv has not, without what they ask for.
TRT_RTX := tensorrt-rtx-cu13==1.7.1.116
DDRANKING := ddranking==0.2.0 kornia==0.9.0 kornia_rs==0.2.0 timm==1.0.31

# Finds what keeps people with a screen reader or a keyboard out of a page.
AXE := 4.11.0

# The oldest diffusers that patchbloom takes: newer ones need a newer huggingface-hub. The others at the
# tested versions, with what they import.
WHEELS ?= wheels
WHEELS_PYTHON ?= 3.12
WHEELS_KIB ?= 56000
GPU_WHEELS := tyro docstring_parser typeguard pydantic pydantic_core annotated-types typing-inspection \
  typing_extensions platformdirs filelock pytest-timeout

# Wheels come from the package index, not from a local folder with other builds of torch in it.
export PIP_FIND_LINKS :=

.PHONY: install setup setup-browser bindings rtx ddranking demo test gpu gpu-wheels bench-table check
install: $(INSTALLED)
setup: $(TESTABLE) bindings rtx ddranking

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 13) else "Python 3.11 to 3.13 is needed, this is %d.%d: make setup PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv

$(INSTALLED): pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(TESTABLE): pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,dev]'
	touch $(INSTALLED) $@

# Per Python, as their extension is; tried again until they are there.
bindings: $(TESTABLE)
	@tag=$$($(BIN)/python -c 'import sys; print(sys.implementation.cache_tag)'); \
	for version in $(TRT_BINDINGS); do \
	  folder=.trt/$$tag/$$version; \
	  test -d $$folder || $(BIN)/python -m pip install --quiet --retries 1 --timeout 10 --no-deps \
	    --only-binary :all: --target $$folder tensorrt-cu13-bindings==$$version || \
	    { rm -rf $$folder; echo "no bindings of TensorRT $$version: tests that need them are skipped"; }; \
	done

# Its meta package has no wheel, its libraries have.
rtx: $(TESTABLE)
	@$(BIN)/python -c 'import tensorrt_rtx' 2>/dev/null || $(BIN)/python -m pip install --quiet --retries 1 \
	  --timeout 10 $(TRT_RTX) || echo "no TensorRT for RTX: the tests that need it are skipped"

ddranking: $(TESTABLE)
	@folder=.ddranking/$$($(BIN)/python -c 'import sys; print(sys.implementation.cache_tag)'); \
	test -d $$folder || $(BIN)/python -m pip install --quiet --retries 1 --timeout 10 --no-deps \
	  --only-binary :all: --target $$folder $(DDRANKING) || \
	  { rm -rf $$folder; echo "no DD-Ranking: the test that needs it is skipped"; }

setup-browser:
	command -v chromium || command -v chromium-browser || apt-get install --yes chromium
	mkdir -p .browser
	npm pack --silent --pack-destination .browser axe-core@$(AXE)
	tar --extract --file .browser/axe-core-$(AXE).tgz --directory .browser --strip-components 1 package/axe.min.js

demo: $(INSTALLED)
	$(BIN)/train --data shapes --model sdxl-tiny --method random rded upsample dace --rho 1.0 \
	  --seeds 3 --out $(DEMO_OUT) --overwrite

test: bindings rtx ddranking
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

GPU_OPTIONS = $(if $(DRY),--dry) $(if $(FULL),--full) $(if $(STAGES),--stages $(STAGES)) \
  $(if $(DATA),--data "$(DATA)") --out "$(OUT)"
GPU_PYTHON = $(if $(and $(VENV),$(or $(DRY),$(wildcard $(TESTABLE)))),$(BIN)/python,$(PYTHON))
ifdef DRY
gpu: $(if $(VENV),$(TESTABLE))
endif
gpu:
	$(GPU_PYTHON) bench/gpu.py $(GPU_OPTIONS)

DOWNLOAD = $(PYTHON) -m pip download --quiet --no-deps --only-binary :all: --dest "$(WHEELS)" \
  --implementation cp --python-version $(WHEELS_PYTHON) \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64
gpu-wheels:
	rm -f "$(WHEELS)"/*.whl
	$(DOWNLOAD) 'diffusers==0.36.0'
	$(DOWNLOAD) --constraint constraints.txt $(GPU_WHEELS)
	@kib=$$(du -sk "$(WHEELS)" | cut -f1); test $$kib -le $(WHEELS_KIB) || \
	  { echo "$(WHEELS): expected at most $(WHEELS_KIB) KiB, got $$kib"; exit 1; }

# Where pyright finds the packages under their installed names: an editable install has no folder of it.
LINKS := build/links/patchbloom
$(LINKS): Makefile
	mkdir -p $@
	ln -sf $(addprefix ../../../,kernels export engine train $(wildcard train/public/*.py)) $@

check: $(TESTABLE) $(LINKS)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/python tests/import_direction.py

bench-table: $(INSTALLED)
	$(BIN)/python bench/tables.py
