# Every target does its own set-up in .venv and redoes nothing that is done.
# PYTHON=python3.11        another interpreter (3.10-3.13) for .venv
# COMFYUI_PATH=~/ComfyUI   your own ComfyUI server instead of the tested one
# PORT=8188                where `make comfyui` listens
# TESTS="tests/unit -k x"  what `make test` runs
# WORKERS=2                in how many processes

CANDIDATES := python3.12 python3.11 python3.10 python3.13 python3
USABLE := import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(firstword $(foreach p,$(CANDIDATES),$(shell $(p) -c '$(USABLE)' 2>/dev/null && echo $(p))))
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -qq
PORT ?= 8188
TESTS ?= tests
WORKERS ?= 2
STAMPS := .venv/stamps
SERVER := $(STAMPS)/server$(if $(COMFYUI_PATH),-own)

.PHONY: demo test lint bench comfyui setup clean
.DEFAULT_GOAL := demo

demo: setup
	@$(PY) -m scripts.demo

test: setup lint
	@$(PY) -m pytest -c tests/pytest.ini -n $(WORKERS) --dist loadfile $(TESTS)

lint: setup
	@$(PY) -m ruff check .
	@$(PY) -m pyright --level error

bench: setup
	@$(PY) -m benchmarks.bench

comfyui: setup
	@$(PY) -m scripts.comfyui.server --port $(PORT)

setup: $(SERVER)

clean:
	rm -rf .venv build/comfyui build/demo build/page

$(STAMPS)/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.10-3.13 with venv was found: install one \
	(Debian: apt install python3-venv, macOS: brew install python@3.12) or name it with PYTHON=."; exit 1; }
	@echo "Making .venv with $(PYTHON)"
	@$(PYTHON) -m venv .venv
	@$(PIP) install -U pip
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/pack: $(STAMPS)/python pyproject.toml constraints/dev.txt
	@echo "Installing the library and its tools (minutes the first time)"
	@$(PIP) install -c constraints/dev.txt torch
	@$(PIP) install -c constraints/dev.txt -e '.[train,dev]'
	@touch $@

$(SERVER): $(STAMPS)/pack scripts/comfyui/install.py
	@$(PY) -m scripts.comfyui.install
	@touch $@
