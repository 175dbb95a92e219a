# `make demo` and `make test` need only Python 3.11 and the package registry; both make .venv when it is missing.
PYTHON ?= python3.11
BIN := .venv/bin
DEMO := runs/demo

# Where the CPU build of torch lies: a folder or a page of wheels. The package index has the CUDA build, gigabytes larger.
TORCH_WHEELS ?= https://download.pytorch.org/whl/cpu/torch/
# Licences that let anyone use, change and pass on what depends on them (MPL: changes to its own files stay open).
LICENCES := MIT;BSD;Apache;0BSD;ISC;PSF;Python Software Foundation;MPL-2.0;Mozilla Public License 2.0;HPND;CC0;Zlib;BSL-1.0

.PHONY: help demo test lint docs package lock audit setup clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      quantize, export, evaluate and report on the embedded demo model"
	@echo "make test      lint and run all tests"
	@echo "make docs      build the documentation into site/"
	@echo "make package   build wheel and sdist into dist/, and check them"
	@echo "make lock      pin every dependency with its hashes in requirements.lock"
	@echo "make audit     licences and known vulnerabilities of what is pinned (the latter needs the internet)"

.venv/.ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

setup: .venv/.ready

demo: setup
	$(BIN)/dsconvert quantize calib/demo/demo.pt --calib calib/demo/images/calib --imgsz 320 --block-size 32 --out $(DEMO) --force
	$(BIN)/dsconvert export $(DEMO)/model.safetensors --onnx --force
	$(BIN)/dsconvert export calib/demo/demo.pt --onnx --imgsz 320 --out $(DEMO)/float32.onnx --force
	$(BIN)/dsconvert eval calib/demo/demo.pt $(DEMO)/float32.onnx $(DEMO)/model.safetensors $(DEMO)/model-packed.onnx --data calib/demo/data.yaml --imgsz 320
	$(BIN)/dsconvert report $(DEMO)/model.safetensors --data calib/demo/data.yaml --force

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy dsconvert calib/demo benchmarks

test: lint
	$(BIN)/pytest --numprocesses 2 --dist loadfile

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

package: setup
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/pytest tests/test_package.py

.venv/.audit: setup
	$(BIN)/pip install --quiet '.[audit]'
	touch $@

lock: .venv/.audit
	echo 'torch==2.13.0+cpu' | $(BIN)/uv pip compile --quiet --generate-hashes --no-annotate --python-version 3.11 \
	  --find-links $(TORCH_WHEELS) --constraints - --extra dev --extra report --no-emit-find-links \
	  --custom-compile-command 'make lock' --upgrade pyproject.toml --output-file requirements.lock

# faster-coco-eval names its licence in a file alone: Apache 2.0
audit: .venv/.audit
	$(BIN)/pip-licenses --with-system --from=mixed --partial-match --allow-only='$(LICENCES)' \
	  --ignore-packages faster-coco-eval \
	  --packages $$(sed -n 's/^\([A-Za-z0-9._-]*\)==.*/\1/p' requirements.lock)
	$(BIN)/pip-audit --strict --disable-pip --require-hashes --requirement requirements.lock

clean:
	rm -rf .venv runs site build dist
