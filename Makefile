# Two commands from a fresh clone: `make demo` and `make test`. Everything is installed into .venv, once.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.stamp-installed
TIMM_STAMP := .venv-timm/.stamp-installed

.PHONY: help install demo test test-timm lint bench clean

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /make \1\t/' | expand -t 16

install: $(STAMP)  ## a virtual environment in .venv with the tested versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "mmjepa needs Python 3.11 or newer and '$(PYTHON)' is not; name one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

demo: install  ## pretrain on a synthetic cohort of CT and EHR, judge it, write runs/demo/report.html
	OMP_WAIT_POLICY=passive $(BIN)/python recipes/pretrain_ct_ehr.py --config recipes/configs/ct_ehr_demo.yaml $(ARGS)

test: install  ## the tests; ARGS="tests/audit -q" runs a part
	OMP_NUM_THREADS=1 $(BIN)/pytest $(ARGS)

test-timm: $(TIMM_STAMP)  ## the tests of the 2.5-D encoder, in an environment of their own (.venv-timm)
	OMP_NUM_THREADS=1 .venv-timm/bin/pytest -m timm tests/encoders $(ARGS)

# `===` admits no local version: torch and torchvision come as one pair of builds. A torch+cpu, which pip prefers where it
# finds one, beside a torchvision for CUDA cannot import.
$(TIMM_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-timm
	.venv-timm/bin/python -m pip install -c constraints.txt $$(sed -nE 's/^(torch|torchvision)==/\1===/p' constraints.txt) \
		-e '.[timm]' pytest hypothesis
	@touch $@

lint: install  ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

bench: install  ## the benchmarks, one after the other
	@set -e; for script in $(wildcard benchmarks/*.py); do echo "== $$script"; OMP_NUM_THREADS=1 $(BIN)/python $$script; done

clean:  ## remove the environment and caches; runs/ stays
	rm -rf .venv .venv-timm build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
