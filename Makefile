# Everything runs in .venv, made from requirements.lock on first use: by uv, four times as fast as pip, or by pip where only
# pip knows the package index (uv does not read pip.conf).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo docs test test-slow test-versions test-tools package lint clean

setup: $(VENV)/ready

$(VENV)/ready: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^uv==' requirements.lock)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode -r requirements.lock || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

# Trains a small network on real images, evaluates it, classifies a few images and leaves plots.
demo: setup
	$(BIN)/python train.py --config configs/fashion_mnist.py:demo --workdir runs/demo
	$(BIN)/spiking-mlp evaluate runs/demo
	$(BIN)/spiking-mlp predict runs/demo tests/data/fashion_*.png --top 3
	@echo; echo "Look at runs/demo/plots:"; ls runs/demo/plots

# The documentation site, into site/: open site/index.html, or serve the folder for its search.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# A coffee break. Two processes for two cores; the tests themselves set warnings to errors and 8 virtual devices.
test: setup lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 10

# The rest: notebooks, site, wheel, many kills, all processes, extremes, and random tests with more examples.
test-slow: setup
	$(BIN)/python -m pytest -n 2 -m "slow or (hypothesis and not tools)" --hypothesis-profile full --durations 10

# The oldest and the newest versions that pyproject.toml allows, each in an environment of its own.
test-versions: setup
	for resolution in lowest-direct highest; do \
	  $(BIN)/uv venv --quiet --clear .venv-$$resolution && \
	  $(BIN)/uv pip install --quiet --python .venv-$$resolution --resolution $$resolution -e '.[dev]' && \
	  .venv-$$resolution/bin/python -m pytest -n 2 --dist loadfile || exit 1; \
	done

# What other tools make of our files: PyTorch with SpikingJelly, and snnTorch, in an environment of their own.
test-tools: .venv-tools/ready
	.venv-tools/bin/python -m pytest -m tools

.venv-tools/ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv-tools
	.venv-tools/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock torch==2.13.0 loguru requests
	.venv-tools/bin/python -m pip install --quiet --disable-pip-version-check --no-deps spikingjelly==2.0.0 snntorch==1.0.0 nirtorch==2.6 -e .
	touch $@

# Wheel and sdist into dist/, then each as a user has it: the wheel, and the wheel made from the sdist, are the same, and an
# environment with nothing else runs the demo. `make package PYTHON=python3.13` tries another Python.
package:
	rm -rf build/package dist
	$(PYTHON) -m venv build/package
	build/package/bin/python -m pip install --quiet --disable-pip-version-check build
	build/package/bin/python -m build --outdir dist .
	build/package/bin/python -m pip install --quiet --disable-pip-version-check "$$(ls -t dist/*.whl | head -1)"
	build/package/bin/python -m pip uninstall --quiet --yes build pyproject_hooks
	build/package/bin/python -m pip check
	cd build/package && bin/spiking-mlp --version && bin/spiking-mlp demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) .venv-tools .venv-lowest-direct .venv-highest runs site build dist .pytest_cache .hypothesis .ruff_cache
