# Every command of this repository. A machine needs Python 3.11 or newer with venv, make, and access to PyPI.
# Everything is installed in this folder. Delete the folder and nothing is left.

OUT ?= maskfleet-demo
# Four on two cores, because many tests wait for servers. The files with servers take longest; in their own order they
# come first.
PYTEST_ARGS ?= -n 4 --dist loadfile --no-loadscope-reorder

# 3.12 and 3.11 come first, because the wheel with the test suite's Redis supports at most 3.12. Each candidate is run,
# because a name on PATH may be a version manager's shim without a Python.
PYTHON = $(shell for python in python3.12 python3.11 python3.13 python3; do \
	"$$python" -c 'import sys, ensurepip, venv; assert sys.version_info >= (3, 11); print(sys.executable)' 2>/dev/null && break; done)

# The project's own uv, when there is none on PATH. Its cache is then in this folder (hard links take no extra space).
UV := $(or $(shell command -v uv 2>/dev/null),.uv/bin/uv)
ifeq ($(UV),.uv/bin/uv)
export UV_CACHE_DIR ?= $(CURDIR)/.uv/cache
endif
export UV_PYTHON_DOWNLOADS := never
export UV_PROJECT_ENVIRONMENT := .venv

# Containers often forbid bytecode, to stay small. Then each of the tests' many processes would compile its libraries
# again.
unexport PYTHONDONTWRITEBYTECODE

# pip and uv have their own certificates, without a company's authority. The system's bundle has it.
CA_BUNDLE := $(firstword $(wildcard $(SSL_CERT_FILE) /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt \
	/etc/ssl/ca-bundle.pem /etc/ssl/cert.pem))
ifneq ($(CA_BUNDLE),)
CERTIFICATES = PIP_CERT=$(CA_BUNDLE) SSL_CERT_FILE=$(CA_BUNDLE)
endif

.PHONY: help setup demo check unit test coverage lint picture reference docs bench sbom mutate fuzz try-deployment

help:  ## Show what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1 /' \
		| while read -r name what; do printf '  make %-15s %s\n' "$$name" "$$what"; done

setup: $(UV)  ## Make .venv with everything for development, or update it
	@test -n "$(PYTHON)" || { echo "make setup: no Python 3.11 or newer with venv on PATH (on Debian: python3-venv)" >&2; exit 2; }
	$(CERTIFICATES) UV_PYTHON="$(PYTHON)" $(UV) sync --frozen --all-extras
	@touch .venv/.complete

.uv/bin/uv:
	@test -n "$(PYTHON)" || { echo "make setup: no Python 3.11 or newer with venv on PATH (on Debian: python3-venv)" >&2; exit 2; }
	"$(PYTHON)" -m venv .uv
	$(CERTIFICATES) .uv/bin/pip install --quiet --no-cache-dir --disable-pip-version-check uv

.venv/.complete: pyproject.toml uv.lock
	@$(MAKE) --no-print-directory setup

# Exit status 1 means that some assets failed. The demo has a few that must fail.
demo: .venv/.complete  ## Label the sample scenes and write a gallery (OUT=folder, maskfleet-demo by default)
	@.venv/bin/maskfleet demo --out "$(OUT)" || [ $$? -eq 1 ]
	@test -s "$(OUT)/index.html"
	@echo "Gallery: $$(cd "$(OUT)" && pwd)/index.html"

check: .venv/.complete  ## Quick check between edits: the linters and, in parallel, the unit tests that are not slow
	@$(MAKE) --no-print-directory -j 2 $(if $(filter output-sync,$(.FEATURES)),-O) lint unit

unit: .venv/.complete
	.venv/bin/pytest -q -m "not gpu and not slow" -n 2 --dist worksteal tests/unit

test: .venv/.complete  ## Run every test that needs no GPU (PYTEST_ARGS="-x tests/unit" and the like)
	.venv/bin/pytest -m "not gpu" $(PYTEST_ARGS)

coverage: .venv/.complete  ## Run every test, and show how many of the product's lines and branches ran
	@rm -f .coverage .coverage.*
	@failed=0; .venv/bin/coverage run -m pytest -m "not gpu" $(PYTEST_ARGS) || failed=1; \
		.venv/bin/coverage combine --quiet && .venv/bin/python -m tests.coverage_figure || failed=1; exit $$failed

lint: .venv/.complete  ## Check style, types and who imports whom
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

picture: .venv/.complete  ## Draw docs/rooms.svg, the picture of the code's folders, again
	@.venv/bin/python infra/draw_rooms.py

reference: .venv/.complete  ## Write docs/commands.md and docs/settings.md from the code again
	@.venv/bin/python -m infra.write_reference

docs: .venv/.complete  ## Build the site of docs/ in out/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict
	@echo "Site: $(CURDIR)/out/site/index.html"

bench: .venv/.complete  ## Run every script of tests/benchmarks (JSON=1 for JSON documents)
	@failed=0; for script in tests/benchmarks/[a-z]*.py; do \
		echo "# $$script" >&2; .venv/bin/python "$$script" $(if $(JSON),--json) || failed=1; done; exit $$failed

sbom: $(UV)  ## Write sbom.json (CycloneDX): what the image holds of Python packages
	$(UV) export --frozen --no-dev --extra models --format cyclonedx1.5 --output-file sbom.json --quiet

mutate: .venv/.complete  ## Remove each safeguard in a copy, one at a time, and see that a test notices (ONLY="text of a name")
	@.venv/bin/python -m tests.mutations.run $(if $(ONLY),--only "$(ONLY)")

fuzz: .venv/.complete  ## Read damaged files with every reader (MINUTES=n); finds go to out/fuzz
	@.venv/bin/python -m tests.fuzz.run --minutes $(or $(MINUTES),1)

try-deployment: .venv/.complete  ## Build, start, break, upgrade and restore the compose deployment on the engine that is there (OLD=commit)
	@.venv/bin/python -m tests.try_deployment $(if $(OLD),--old $(OLD)) $(if $(OUT_DIR),--out $(OUT_DIR))

ifneq ($(wildcard tests/faults/campaign.py),)
.PHONY: campaign
campaign: .venv/.complete  ## Kill processes at random and count what is lost (ASSETS=n FAULTS=n JSON=1)
	@.venv/bin/python -m tests.faults.campaign $(if $(ASSETS),--assets $(ASSETS)) $(if $(FAULTS),--faults $(FAULTS)) $(if $(JSON),--json)
endif
