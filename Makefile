# make demo   the whole story on this machine, from nothing
# make test   everything that must pass before a change lands
# make help   the rest
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo -E)
VENV := .venv
BIN := $(VENV)/bin
PYTHON := $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(not sys.version_info >= (3, 11))' 2>/dev/null && echo $$p && break; done)
PACKAGES := ca-certificates debian-archive-keyring e2fsprogs faketime iproute2 iptables mmdebstrap mount openssh-client python3-venv
# an engine that is there already, Docker's own for instance, is left alone
PACKAGES += $(shell command -v dockerd >/dev/null || [ -x /usr/sbin/dockerd ] || echo docker.io)
ROLES := docker block_volume rclone etl mlflow_stack backup lease_guard
# what takes longest begins first
LONG := e2e molecule-mlflow_stack molecule-backup molecule-block_volume test-cloud
export PATH := $(CURDIR)/$(BIN):$(PATH)
export ANSIBLE_CONFIG := $(CURDIR)/playbooks/ansible.cfg
export ANSIBLE_ROLES_PATH := $(CURDIR)/roles

.PHONY: help
help: ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.PHONY: packages
packages: ## Debian packages that the sandbox needs; asks for nothing where they are there
	@missing=$$(for p in $(PACKAGES); do dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	if [ -n "$$missing" ]; then \
	  echo "installing" $$missing; \
	  $(SUDO) apt-get update -qq; \
	  DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	fi

$(VENV)/.installed: requirements.lock pyproject.toml
	@[ -n "$(PYTHON)" ] || { echo "labctl needs Python 3.11 or newer"; exit 2; }
	@echo "installing the locked Python packages (about a minute)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

.PHONY: venv
venv: packages $(VENV)/.installed ## the virtual environment with the exact versions of requirements.lock

.PHONY: lock
lock: ## requirements.lock anew from pyproject.toml
	uv pip compile -q --universal --python-version 3.11 pyproject.toml --group dev --generate-hashes --no-header -o requirements.lock

.PHONY: sandbox
sandbox: venv ## the embedded cloud, running
	$(SUDO) $(BIN)/labctl sandbox up

.PHONY: demo
demo: venv ## nothing -> a lab, a dataset, a run; the server is deleted; the run is there again
	$(SUDO) $(BIN)/python tests/demo.py

.PHONY: lint
lint: venv ## ruff, mypy --strict, ansible-lint (production), shellcheck where there is one
	ruff check .
	ruff format --check .
	mypy
	ansible-lint --offline -q
	python tests/check_specs.py

.PHONY: unit
unit: venv ## unit tests
	pytest tests/unit

.PHONY: molecule
molecule: $(ROLES:%=molecule-%) ## a scenario per role; `make molecule-docker` for one

molecule-%: sandbox
	$(SUDO) $(BIN)/molecule test -s $*

.PHONY: test-cloud
test-cloud: sandbox ## the cloud code against a real OpenStack (LABCTL_TEST_CLOUD; the sandbox by default)
	$(SUDO) $(BIN)/pytest --durations=8 -m "not slow" tests/cloud

.PHONY: e2e
e2e: sandbox ## the command line from outside, on one lab
	$(SUDO) $(BIN)/pytest --durations=16 -m "not slow" tests/e2e

.PHONY: test
test: lint unit sandbox ## everything that must pass before a change lands
	$(BIN)/python tests/parallel.py $(LONG) $(filter-out $(LONG),$(ROLES:%=molecule-%) molecule-rebuild)

.PHONY: test-slow
test-slow: sandbox ## the long soak
	$(SUDO) $(BIN)/pytest -m slow tests/e2e tests/sandbox
	$(SUDO) $(BIN)/pytest -m slow tests/cloud
	$(SUDO) env LABCTL_TEST_MARKS=slow $(BIN)/molecule test -s rclone

.PHONY: bench
bench: sandbox ## build/bench.json: ping, cold and no-op converge, rebuild, and the tutorial by hand
	$(SUDO) $(BIN)/python tests/bench/converge.py

.PHONY: bench-data
bench-data: sandbox ## build/bench-data.json: a dataset into the store and back, against the tutorial's commands
	$(SUDO) $(BIN)/python tests/bench/data.py

.PHONY: wheel
wheel: venv ## dist/labctl-*.whl
	$(BIN)/python -m hatchling build -t wheel

.PHONY: clean
clean: ## everything that demo and the tests made: sandbox with its data, images, build files
	[ ! -x $(BIN)/labctl ] || $(SUDO) $(BIN)/labctl --yes sandbox destroy --images
	$(SUDO) $(BIN)/python tests/nodes.py destroy-all 2>/dev/null || true
	$(SUDO) rm -rf build dist $(VENV)
