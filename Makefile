# Everything starts here: `make demo` trains on real Atari Pong, `make test` runs all tests. Both set up a virtual
# environment in .venv first; nothing but Python 3.11+ (with venv) and make is needed.

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
PIP = $(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint gpu-check setup clean

setup: $(VENV)/ready-all

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo "error: Python 3.11 or newer is needed: make PYTHON=python3.11" >&2; exit 1)
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || (echo "error: Python's venv is missing: apt install python3-venv" >&2; exit 1)
	$(PYTHON) -m venv $(VENV)
	$(PIP) "torch==2.13.*"
	$(PIP) -e .
	@touch $@

$(VENV)/ready-all: $(VENV)/ready
	$(PIP) -e ".[dmc,crafter,minigrid,popgym,vizdoom,compare,hub,play,ray,slurm,dev]"
	@touch $@

demo: $(VENV)/ready
	$(RUN) dreamer.py --configs demo tiny_dreamerv3 --logdir runs/demo

# Two processes, a file at a time in each.
test: setup
	$(RUN) -m pytest -q -n 2 --dist loadfile

# On a machine with an NVIDIA card: is the update right there, and how fast. Prints a table to send.
gpu-check: setup
	$(RUN) benchmarks/gpu_check.py --out runs/gpu_check

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info
