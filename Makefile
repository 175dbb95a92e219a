# `make demo` and `make test` need only Python 3.11 and the package registry; both make .venv when it is missing.
PYTHON ?= python3.11
BIN := .venv/bin
DEMO := runs/demo

.PHONY: help demo test lint docs package setup clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      quantize, export, evaluate and report on the embedded demo model"
	@echo "make test      lint and run all tests"
	@echo "make docs      build the documentation into site/"
	@echo "make package   build wheel and sdist into dist/, and check them"

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
	$(BIN)/pytest

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

package: setup
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/pytest tests/test_package.py

clean:
	rm -rf .venv runs site build dist
