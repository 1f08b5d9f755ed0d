# The only entry point for commands. `make help` lists them.
# Needs Python 3.11, pip and make; uv and everything else are brought along into .tools and .venv.

SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
UV := .tools/bin/uv
# A resolved environment is stamped, so that repeated targets do not resolve again.
SYNCED := .venv/.synced
RUN := $(UV) run --no-sync
BUF_VERSION := 1.75.0
BUF := .tools/node/node_modules/.bin/buf
ARGS ?=

# A stack is some twenty Python processes: without compiled files each of them compiles everything anew at its start.
unexport PYTHONDONTWRITEBYTECODE
export UV_LINK_MODE ?= copy
export UV_HTTP_TIMEOUT ?= 300

.PHONY: help
help:  ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(UV):
	@echo "Installing uv into .tools ..."
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-warn-script-location --root-user-action=ignore --target .tools uv

$(SYNCED): $(UV) pyproject.toml uv.lock
	@$(UV) sync --locked --all-extras --python "$$(scripts/choose_python.sh)"
	@touch $@

.PHONY: setup
setup: $(SYNCED)  ## Install everything into .venv

.PHONY: demo
demo: $(SYNCED)  ## Train a model across 15 hospital processes (ARGS="--privacy none --data DIR ...")
	@$(RUN) fedmesh demo $(ARGS)

.PHONY: up down status
up: $(SYNCED)  ## Start a stack that stays: PostgreSQL, Redis and the four services
	@$(RUN) fedmesh up $(ARGS)
down: $(SYNCED)  ## Stop that stack; its data stays
	@$(RUN) fedmesh down $(ARGS)
status: $(SYNCED)  ## Say what runs
	@$(RUN) fedmesh status $(or $(ARGS),--dir .fedmesh/up)

# By file, for the sake of stacks that a module's tests share; in order, for the longest ones come first.
.PHONY: test
test: $(SYNCED)  ## Run the default test suite (real PostgreSQL, Redis, TLS and processes)
	@$(RUN) pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" $(ARGS)

.PHONY: test-slow
test-slow: $(SYNCED)  ## Run the tests that take minutes
	@$(RUN) pytest -m slow $(ARGS)

PEERS := .cache/bench-peers
.PHONY: bench-peers
bench-peers: $(SYNCED)  ## Secure sums of fedmesh, Flower and NVFlare side by side; fails when a limit is missed (half an hour; ARGS="--runs 1": a quarter)
	@mkdir -p $(PEERS)
	@for size in 2048 100000 1000000; do \
	  $(RUN) fedmesh bench secure-sum --params $$size --rounds 3 --report $(PEERS)/fedmesh-$$size.json || exit 1; done
	@$(RUN) fedmesh bench secure-sum --params 1000000 --lanes 1 --rounds 3 --report $(PEERS)/fedmesh-1000000-1.json
	@$(RUN) python -m loadtests.peers --params 100000,1000000 --report $(PEERS)/peers.json $(ARGS)
	@$(RUN) python -m loadtests.peers.compare $(PEERS)/peers.json $(PEERS)/fedmesh-*.json

.PHONY: chaos
chaos: $(SYNCED)  ## Break replicas and stores under load and compare with what was acknowledged (45 minutes; REPORT=FILE)
	@$(RUN) python -m loadtests.chaos $(if $(REPORT),--report $(abspath $(REPORT))) $(ARGS)

.PHONY: loadtest
loadtest: $(SYNCED)  ## Calls, uploads, the audit log and 1,000 idle hospitals load a stack (6 minutes; REPORT=FILE)
	@GRPC_VERBOSITY=NONE $(RUN) python -m loadtests.load $(if $(REPORT),--report $(abspath $(REPORT))) $(ARGS)

.PHONY: capacity
capacity: $(SYNCED)  ## Measure what docs/capacity.md starts from, and write its tables (10 minutes)
	@GRPC_VERBOSITY=NONE $(RUN) python -m loadtests.capacity.measure $(ARGS)

.PHONY: restore-drill
restore-drill: $(SYNCED)  ## Lose PostgreSQL, restore it to a moment by each of three tools, and count what was lost (minutes)
	@$(RUN) python -m tests.support.backup_programs
	@GRPC_VERBOSITY=NONE $(RUN) pytest -q --capture=sys --no-header -m slow tests/integration/registry/test_restore.py $(ARGS)

.PHONY: test-timescale
test-timescale: $(SYNCED)  ## Measurements on a server that has TimescaleDB (DSN="host=... user=postgres ...", a superuser's)
	@test -n "$(DSN)" || { echo 'name a server for tests: make test-timescale DSN="host=... user=postgres password=..."'; exit 2; }
	@FEDMESH_TIMESCALE_DSN="$(DSN)" $(RUN) pytest -q tests/contract/test_measurements.py $(ARGS)

.PHONY: fmt
fmt: $(SYNCED)  ## Format the code
	@$(RUN) ruff format .
	@$(RUN) ruff check --fix .

.PHONY: gen
gen: $(SYNCED)  ## Regenerate proto/gen from proto/fedmesh
	@$(RUN) scripts/generate_protos.sh

.PHONY: check
check: $(SYNCED) check-code check-protos check-centre check-dependencies  ## Lint, types, import contracts, protos, dependencies

.PHONY: check-code
check-code: $(SYNCED)  ## ruff, mypy --strict, import-linter
	@$(RUN) ruff format --check .
	@$(RUN) ruff check .
	@$(RUN) mypy
	@$(RUN) lint-imports

.PHONY: check-protos
check-protos: $(SYNCED) $(BUF)  ## Generated code is fresh; buf lint; no breaking change against the last commit on main
	@rm -rf .cache/gen && $(RUN) scripts/generate_protos.sh .cache/gen >/dev/null
	@diff -r -x __pycache__ proto/gen .cache/gen || { echo "proto/gen is stale: run 'make gen'"; exit 1; }
	@cd proto && ../$(BUF) lint
	@scripts/check_proto_breaking.sh $(abspath $(BUF))

$(BUF):
	@command -v npm >/dev/null || { echo "buf comes from npm: install Node.js to run this check"; exit 1; }
	@npm install --silent --no-fund --no-audit --prefix .tools/node @bufbuild/buf@$(BUF_VERSION)

.PHONY: check-centre
check-centre: $(UV)  ## The control plane installs without TensorFlow, in under 400 MB
	@scripts/check_centre_dependencies.sh $(abspath $(UV))

.PHONY: check-dependencies
check-dependencies: $(UV)  ## Known weaknesses of what the images install, by pip-audit; STRICT=1 fails when nobody answers
	@STRICT=$(STRICT) $(PYTHON) scripts/check_dependencies.py $(abspath $(UV))

.PHONY: sbom
sbom: $(UV)  ## Write a CycloneDX bill of materials for each image into .cache/sbom
	@scripts/make_sbom.sh $(abspath $(UV)) .cache/sbom

.PHONY: helm-check
helm-check: $(UV)  ## The charts and the Dockerfile: Helm, schemas, policies, alerts, a played installation, checkov, hadolint
	@scripts/check_helm.sh $(abspath $(UV))

.PHONY: observe-check
observe-check: $(SYNCED)  ## A real Prometheus on a real run: rules load, no panel of a dashboard is empty, one trace a round
	@scripts/fetch_prometheus.sh
	@$(RUN) pytest -m slow tests/e2e/test_seen.py $(ARGS)

.PHONY: dashboards
dashboards: $(SYNCED)  ## Write the charts' Grafana dashboards anew from scripts/make_dashboards.py
	@$(RUN) python scripts/make_dashboards.py helm

OPS_PICTURE := $(or $(PICTURE),.cache/ops-page.png)
.PHONY: ops-page
ops-page: $(SYNCED)  ## Look at the coordinator's page in a browser and keep pictures of it (PICTURE=FILE.png)
	@scripts/fetch_chromium.sh
	@mkdir -p $(dir $(OPS_PICTURE))
	@OPS_PAGE_PICTURE=$(abspath $(OPS_PICTURE)) $(RUN) pytest -q -m slow tests/integration/coordinator/test_ops_page.py $(ARGS)
	@ls $(basename $(OPS_PICTURE))*.png

.PHONY: clean
clean:  ## Remove caches and environments; data of stacks stays
	@rm -rf .venv .tools .cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
