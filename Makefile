# One door for people and CI. `make help` lists the targets.
.DEFAULT_GOAL := help
.PHONY: help demo embeddings ocr speech environments test collected test-fast test-long soak chaos siege check format lint types proto proto-check lock clean

# Without compiled modules a node needs 12 s of processor time to be ready instead of 6, and each worker of the tests
# rewrites the assertions of every file.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
PY := $(VENV)/bin/python
# Processes that `make test` runs tests in, beside the one for tests that only wait (tests/worker_assignment.py).
TESTERS ?= 2
# How long `make chaos` kills.
MINUTES ?= 3
STAMP := $(VENV)/.installed
CLIENT_VENV := .venv-tritonclient
CLIENT_STAMP := $(CLIENT_VENV)/.installed
TRITON_VENV := .venv-triton
TRITON_STAMP := $(TRITON_VENV)/.installed
# The compilers of the GPU kernels, which need no GPU, and numba.cuda's simulator.
CUDA_STAMPS := .venv-cuda12/.installed .venv-cuda13/.installed
ORIGINALS_VENV := .venv-originals
ORIGINALS_STAMP := $(ORIGINALS_VENV)/.installed

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(STAMP): locks/shoal.txt pyproject.toml tools/venv.sh
	@tools/venv.sh $(VENV) locks/shoal.txt .
	@# Compiled once, here, and not by every process of the first node at the same time; nor by every process for ever,
	@# where PYTHONDONTWRITEBYTECODE is set.
	@$(PY) -c 'import numba, services.coord.app, services.infer.app, services.ingest.app, services.store.app, shoal.cli.main'

$(CLIENT_STAMP): locks/tritonclient.txt tools/venv.sh
	@tools/venv.sh $(CLIENT_VENV) locks/tritonclient.txt

$(TRITON_STAMP): locks/triton.txt tools/venv.sh
	@tools/venv.sh $(TRITON_VENV) locks/triton.txt

.venv-cuda%/.installed: locks/cuda%.txt tools/venv.sh
	@tools/venv.sh .venv-cuda$* locks/cuda$*.txt

$(ORIGINALS_STAMP): locks/originals.txt tools/venv.sh
	@UNHASHED=1 tools/venv.sh $(ORIGINALS_VENV) locks/originals.txt

demo: $(STAMP) ## Start a node, send real files through it both ways, check every answer, stop
	@$(PY) -m examples.filetypes.demo

embeddings: $(STAMP) $(ORIGINALS_STAMP) ## Text embeddings and a search, beside sentence-transformers
	@$(PY) -m examples.embeddings.demo

ocr: $(STAMP) $(ORIGINALS_STAMP) ## The text on images, beside rapidocr-onnxruntime (ARGS="photo.jpg ...")
	@$(PY) -m examples.ocr.demo $(ARGS)

speech: $(STAMP) $(ORIGINALS_STAMP) ## Streams of speech, each with its state in the server, beside silero-vad
	@$(PY) -m examples.speech.demo

environments: $(STAMP) $(CLIENT_STAMP) $(TRITON_STAMP) $(CUDA_STAMPS) $(ORIGINALS_STAMP) ## Build every environment

test: environments ## Run every test
	@tools/clients.sh
	@$(PY) -m pytest -n $$(($(TESTERS) + 1)) --dist loadfile --patient --costs 20 $(ARGS)

# Imports each test once. Without it each worker of `make test` compiles every test and what it imports, at the same time as
# the others: 12 s of processor time each.
collected: $(STAMP) ## Check that every test can be imported
	@found=$$($(PY) -m pytest --collect-only -qq -p no:cacheprovider 2>&1) || { echo "$$found"; exit 1; }

test-fast: $(STAMP) ## Run what a change of one file needs: no node, and nothing that waits
	@$(PY) -m pytest -n 2 --dist loadfile --fast --costs 5 $(ARGS)

test-long: environments ## Run every test in its long form: more examples, more kills (tests/long_form.py)
	@SHOAL_TEST_LONG=1 $(MAKE) --no-print-directory test

soak: $(STAMP) ## Load the inference server for ten minutes: no wrong answer, flat memory
	@$(PY) bench/soak.py --seconds 600 $(ARGS)

chaos: $(STAMP) ## Kill parts of a node at random under load (MINUTES=3), then compare every job with its result
	@SHOAL_CHAOS_MINUTES=$(MINUTES) $(PY) -m pytest -q -s tests/chaos/test_chaos.py $(ARGS)

siege: $(STAMP) ## Attack the server while bystanders call, straight and through a gateway: a table (ARGS="--only ping")
	@$(PY) -m bench.siege $(ARGS)

check: $(STAMP) lint types proto-check test ## Format, lint, types, fresh generated code, and every test

format: $(STAMP) ## Format the code
	@$(VENV)/bin/ruff format . && $(VENV)/bin/ruff check --fix-only --quiet .

lint: $(STAMP) ## Check format and lint
	@$(VENV)/bin/ruff format --check . && $(VENV)/bin/ruff check .

types: $(STAMP) ## Check types
	@$(VENV)/bin/mypy
	@MYPYPATH=bench $(VENV)/bin/mypy --config-file= --ignore-missing-imports --follow-imports=silent \
		--disable-error-code arg-type --disable-error-code misc --disable-error-code valid-type bench/*.py

proto: $(STAMP) ## Generate the Python stubs and docs/openapi.json from proto/
	@$(PY) tools/gen_proto.py
	@$(PY) -m tools.openapi

proto-check: $(STAMP) ## Fail when the generated stubs or docs/openapi.json are stale
	@$(PY) tools/gen_proto.py --check
	@$(PY) -m tools.openapi --check

lock: ## Renew the lock files
	@tools/lock.sh

clean: ## Remove the environments and caches
	rm -rf $(VENV) $(CLIENT_VENV) $(TRITON_VENV) $(ORIGINALS_VENV) .venv-cuda12 .venv-cuda13 .venv-uv
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
