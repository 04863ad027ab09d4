# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo bench bench-readme bench-kme test test-long lint venv clean

$(VENV)/.runtime: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "qvpn needs Python >= 3.11: set PYTHON=")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@# an independent SKIP client; without what it needs for TLS-PSK, which is there as C source only
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps skip-qkd==1.0.0
	@touch $@

venv: $(VENV)/.dev

demo: $(VENV)/.runtime
	@$(BIN)/qvpn demo

# qvpn beside other tunnel programs, 15-20 minutes alone on the machine; INSTALL=1 fetches the others first.
# ROUNDS=1 LINKS=default is a quick look.  Results go to OUT.
ROUNDS ?= 5
LINKS ?= all
OUT ?= deploy/bench
bench: $(VENV)/.runtime
	@mkdir -p $(OUT)
	@$(BIN)/qvpn bench crypto > $(OUT)/crypto.md
	@$(BIN)/qvpn bench memory > $(OUT)/memory.md
	@$(BIN)/qvpn bench floor > $(OUT)/floor.md
	@$(BIN)/qvpn bench net --rounds $(ROUNDS) --links $(LINKS) --peers all --extras --out $(OUT) $(if $(INSTALL),--install)

# The table of the last run into the README.
bench-readme: $(VENV)/.runtime
	@$(BIN)/python -m qvpn.bench.readme $(OUT)/results.json README.md

# The KME under load, on SQLite and PostgreSQL, beside a plain server in the same rounds: three to four minutes.
bench-kme: $(VENV)/.dev
	@$(BIN)/python -m tests.bench.kme_load_postgres 5 60 --seconds 120 --out $(OUT)/kme.md

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Tests of packets in real namespaces measure time and losses, so they get the machine for themselves.
test: lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not netns"
	$(BIN)/python -m pytest -q -m netns

test-long: lint
	QVPN_TEST_LONG=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not netns" -o timeout=1800
	QVPN_TEST_LONG=1 $(BIN)/python -m pytest -q -m netns -o timeout=1800

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis htmlcov .coverage
