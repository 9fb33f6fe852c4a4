# Two commands: `make report` and `make test`. Each makes its own environment in .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: report test test-long lab check clean help

help:            ## show this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

report: $(VENV)/.ready       ## run the studies that are not up to date, write reports/report.html
	$(BIN)/mambabyte sweep
	$(BIN)/mambabyte report

# A process a core; tests of one file share what it prepares, so they stay together.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile

test: $(VENV)/.test check    ## lint, types and tests
	$(PYTEST)

test-long: $(VENV)/.test     ## the tests that take minutes
	$(PYTEST) -m 'long and not gpu'

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/mypy

lab: $(VENV)/.lab            ## JupyterLab on the notebooks, same environment
	$(BIN)/jupyter lab notebooks

clean:                       ## delete the environment and what was generated
	rm -rf $(VENV) reports/runs reports/report.html reports/appendices

# Each stamp is newer than what it was made from, so nothing is installed twice.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else 0'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.ready
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

$(VENV)/.lab: $(VENV)/.ready
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[lab]'
	@touch $@
