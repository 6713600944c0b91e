# Everything starts here: `make demo` trains an agent on MinAtar Breakout until it beats random play, `make test` runs
# all tests. Both set up a virtual environment in .venv first; nothing but Python 3.11+ (with venv) and make is needed.
# Keys of a demo go into ARGS: make demo-atari ARGS="--steps 100000".

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
PIP = $(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt

ARGS ?=

.PHONY: demo demo-atari docs test lint gpu-check setup clean

setup: $(VENV)/ready-all

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo "error: Python 3.11 or newer is needed: make PYTHON=python3.11" >&2; exit 1)
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || (echo "error: Python's venv is missing: apt install python3-venv" >&2; exit 1)
	$(PYTHON) -m venv $(VENV)
	$(PIP) "torch==2.13.*"
	$(PIP) -e .
	@touch $@

$(VENV)/ready-all: $(VENV)/ready
	$(PIP) -e ".[dmc,crafter,minigrid,popgym,vizdoom,compare,hub,play,ray,slurm,minari,dinov2,docs,dev]"
	@touch $@

$(VENV)/ready-demo: $(VENV)/ready
	$(PIP) -e ".[compare,play]"
	@touch $@

demo: $(VENV)/ready-demo
	$(RUN) demo.py $(ARGS)

# Real Atari Pong: the model learns the field in five minutes, a better return than -21 takes far longer.
demo-atari: $(VENV)/ready-demo
	$(RUN) demo.py --configs demo_atari tiny_dreamerv3 --logdir runs/demo_atari $(ARGS)

# The documentation as a site, in build/site/index.html; a warning is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(RUN) -m mkdocs build --strict --quiet
	@echo "open build/site/index.html; with its search: $(RUN) -m http.server -d build/site"

# Two processes, a file at a time in each, in the order of tests/conftest.py.
test: setup
	$(RUN) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# On a machine with an NVIDIA card: is the update right there, and how fast. Prints a table to send.
gpu-check: setup
	$(RUN) benchmarks/gpu_check.py --out runs/gpu_check

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info
