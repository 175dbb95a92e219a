# `make demo` and `make test` need only Python 3.11 and the package registry; both make .venv when it is missing.
PYTHON ?= python3.11
BIN := .venv/bin
DEMO := runs/demo

# The CPU build of torch, as the package index has the CUDA build, gigabytes larger, and the page or folder of its wheels:
# pip's own setting, where there is one. A folder has wheels for one processor; the lock is for ARM, too.
TORCH := 2.13.0+cpu
TORCH_WHEELS ?= $(or $(PIP_FIND_LINKS),https://download.pytorch.org/whl/cpu/torch/)
TORCH_ARM := sha256:84453b69508ec79902f899c5ed9495acb9e2bbe9fda5f1d5d6f19e3c3842e1a7
# Licences that let anyone use, change and pass on what depends on them (MPL: changes to its own files stay open).
LICENCES := MIT;BSD;Apache;0BSD;ISC;PSF;Python Software Foundation;MPL-2.0;Mozilla Public License 2.0;HPND;CC0;Zlib;BSL-1.0

# What is installed is what the locks name, every file checked against its hash.
INSTALL := $(BIN)/pip install --quiet --require-hashes --find-links $(TORCH_WHEELS) --requirement requirements.lock
COMPILE = $(BIN)/uv pip compile --quiet --python-version 3.11 --find-links $(TORCH_WHEELS) --no-emit-find-links \
  --custom-compile-command 'make lock' pyproject.toml
ONE_OF_THEM = $(COMPILE) --generate-hashes --no-annotate --constraints .venv/versions.txt
NOT_AGAIN = $$(sed -n 's/^\([A-Za-z0-9._-]*\)==.*/--no-emit-package \1/p' requirements.lock)

# The tests of `make check`: those of the rooms where the maths is. Every module of dsconv, graph, fit and export is reached
# by one of them.
CHECKED := $(patsubst %,tests/%,dsconv graph fit measure export widths)
# Two processes share the tests; the one that is done first takes over what the other has not begun.
PYTEST := $(BIN)/pytest --numprocesses 2 --dist worksteal
# Python keeps what it compiled, whatever is set here: else each process compiles every file of tests and product again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo lint check test test-all docs package lock lowest audit bench ops test-ops arm setup clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      quantize, export, evaluate and report on the embedded demo model"
	@echo "make check     lint, types, and the tests of maths, graph, fit and export"
	@echo "make test      lint, types, and every test but the long ones: what a change must pass"
	@echo "make test-all  the long ones: files from strangers, kills, leaks, accuracy, the demo as a whole"
	@echo "make docs      build the documentation into site/"
	@echo "make package   build wheel and sdist into dist/, and check them"
	@echo "make bench     install what benchmarks compare with: OpenVINO, NNCF, MNN"
	@echo "make ops       build the operator library of ops/ and install it (needs a C compiler)"
	@echo "make test-ops  the same, and its tests"
	@echo "make arm       run exported files, and the library, on an emulated ARM processor (needs Debian's qemu-user-static)"
	@echo "make lock      pin every dependency with its hashes in requirements.lock and locks/"
	@echo "make lowest    the tests of make check with the oldest versions that pyproject.toml allows (gigabytes)"
	@echo "make audit     licences and known vulnerabilities of what is pinned (the latter needs the internet)"

.venv/.ready: pyproject.toml requirements.lock locks/dev.lock
	$(PYTHON) -m venv .venv
	$(INSTALL) --requirement locks/dev.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
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
	$(BIN)/codespell README.md CHANGELOG.md docs dsconvert benchmarks tests examples
	$(BIN)/proselint --config .proselintrc.json check -o compact README.md docs/*.md

check: lint
	$(PYTEST) -m 'not long' $(CHECKED)

test: lint
	$(PYTEST) -m 'not long'

test-all: setup
	$(PYTEST) -m long

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

package: setup
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/pytest tests/project/test_package.py

# Elsewhere than in .venv, and gigabytes: of old versions of torch the package index has the CUDA build alone.
lowest: .venv/.audit
	$(PYTHON) -m venv .venv/lowest
	$(BIN)/uv pip install --quiet --python .venv/lowest/bin/python --resolution lowest-direct '.[report]'
	$(BIN)/uv pip install --quiet --python .venv/lowest/bin/python pytest pytest-xdist hypothesis pillow pycocotools
	PYTHONPATH=. .venv/lowest/bin/python -m pytest --numprocesses 2 --dist worksteal -m 'not long' $(CHECKED)

bench: setup
	$(INSTALL) --requirement locks/bench.lock

# A wheel of its own, which nothing else needs. Its tests are among all others, and skip where it is not installed.
ops: setup
	$(INSTALL) --requirement locks/ops.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --force-reinstall ./ops

test-ops: ops
	$(PYTEST) tests/ops tests/export/test_fast.py

arm: setup
	$(BIN)/python benchmarks/arm.py

.venv/.audit: .venv/.ready locks/audit.lock
	$(INSTALL) --requirement locks/audit.lock
	touch $@

# One choice of versions for all, then a lock for each purpose: what runs, and what development, benchmarks and audits add.
lock: .venv/.audit
	echo 'torch==$(TORCH)' | $(COMPILE) --constraints - --all-extras --upgrade --output-file .venv/versions.txt
	$(ONE_OF_THEM) --extra report --output-file requirements.lock
	grep -q '$(TORCH_ARM)' requirements.lock || sed -i 's/^torch==.*/&\n    --hash=$(TORCH_ARM) \\/' requirements.lock
	for extra in dev bench ops audit; do $(ONE_OF_THEM) --extra $$extra $(NOT_AGAIN) --output-file locks/$$extra.lock || exit 1; done

# faster-coco-eval names its licence in a file alone: Apache 2.0. codespell is GPL 2.0: a program that lint runs, and that
# nothing imports.
audit: .venv/.audit
	$(BIN)/pip-licenses --with-system --from=mixed --partial-match --allow-only='$(LICENCES)' \
	  --ignore-packages faster-coco-eval codespell \
	  --packages $$(sed -n 's/^\([A-Za-z0-9._-]*\)==.*/\1/p' requirements.lock locks/dev.lock)
	$(BIN)/pip-audit --strict --disable-pip --require-hashes --requirement requirements.lock

clean:
	rm -rf .venv runs site build dist
