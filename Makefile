# make demo    install, fetch SmolLM2-135M-Instruct, convert it, and stream its answer; PROMPT="..." asks something else
# make serve   the same model behind an HTTP server on port 8000; SERVE="--port 8001" passes options to l4jax serve
# make test    install, and run the whole test suite, on two cores; PYTEST="-k cache -n 0" passes options to pytest
# make test-all    also the tests that take hours: more models and meshes, and the tokens of hundreds of prompts
# make test-oldest the suite on the oldest JAX that is allowed, in a .venv-oldest of its own
# make test-h100   compile the real models for H100s, on any machine: fetches XLA's CUDA compiler (500 MB) into .venv
# make test-kernels only pallas_kernels: results in JAX's simulator of an H100, and registers and spills of the compiled kernels
# make test-serve  the server's page in a headless Chromium, which must be installed; fetches Playwright (50 MB) into .venv
# make setup   only prepare .venv
# make check   ruff and mypy

.PHONY: demo serve test test-all test-oldest test-h100 test-kernels test-serve setup check clean
.DEFAULT_GOAL := demo
SHELL := /bin/sh
VENV := .venv
OLDEST := .venv-oldest
STAMP := $(VENV)/.installed
H100 := $(VENV)/h100
BROWSER := $(VENV)/browser

# The question must reach the shell as it was typed: not expanded by make, not quoted by us.
demo: export L4JAX_DEMO_PROMPT := $(value PROMPT)
unexport PROMPT

demo: $(STAMP)
	@if [ -n "$$L4JAX_DEMO_PROMPT" ]; then \
	  $(VENV)/bin/l4jax demo --prompt="$$L4JAX_DEMO_PROMPT"; \
	else \
	  $(VENV)/bin/l4jax demo; \
	fi

serve: $(STAMP)
	@$(VENV)/bin/l4jax serve "$$($(VENV)/bin/python -m l4jax.smollm2)" --dtype float32 $(SERVE)

test: $(STAMP)
	@$(VENV)/bin/python -m pytest -n 2 --dist worksteal $(PYTEST)

test-all: $(STAMP)
	@$(VENV)/bin/python -m pytest -n 2 --dist worksteal -m "not h100 and not browser" $(PYTEST)

test-oldest: $(OLDEST)/.installed
	@$(OLDEST)/bin/python -m pytest -n 2 --dist worksteal $(PYTEST)

# The compiler lies in a folder of its own: JAX must not find it, and miss the rest of CUDA, when it runs on this machine.
test-h100: $(H100)/.installed
	@PYTHONPATH=$(H100) $(VENV)/bin/python -m pytest -m h100 $(PYTEST)

test-kernels: $(H100)/.installed
	@$(VENV)/bin/python -m pytest -n 2 --dist worksteal tests/pallas_kernels $(PYTEST)
	@PYTHONPATH=$(H100) $(VENV)/bin/python -m pytest -m h100 tests/pallas_kernels $(PYTEST)

test-serve: $(BROWSER)/.installed
	@PYTHONPATH=$(BROWSER) $(VENV)/bin/python -m pytest -m browser tests/serving $(PYTEST)

setup: $(STAMP)

check: $(STAMP)
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) $(OLDEST)

$(STAMP): constraints.txt
$(OLDEST)/.installed: constraints-oldest.txt

# A pyenv shim exists for versions that are not installed, so every candidate is run before it is believed.
$(STAMP) $(OLDEST)/.installed: pyproject.toml
	@if ! $(@D)/bin/python -m pip --version >/dev/null 2>&1; then \
	  for python in python3.12 python3.13 python3.14 python3 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python3; do \
	    if "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then found="$$python"; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "l4jax needs Python 3.12 or later with its venv module, and none was found." >&2; \
	    echo "Debian 13 and later: apt-get install python3 python3-venv" >&2; \
	    echo "Debian 12: install pyenv, then: pyenv install 3.12" >&2; \
	    exit 1; \
	  fi; \
	  echo "Making $(@D) with $$("$$found" --version)"; \
	  "$$found" -m venv --clear $(@D) || exit 1; \
	fi
	@echo "Installing l4jax and its dependencies into $(@D): some minutes, about 900 MB"
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(filter constraints%,$^) hatchling editables
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(filter constraints%,$^) --no-build-isolation --editable '.[dev]'
	@touch $@

$(H100)/.installed: $(STAMP)
	@echo "Installing XLA's CUDA compiler into $(H100)"
	@rm -rf $(H100)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps --target $(H100) \
	  jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-crt nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-nvvm
	@touch $@

$(BROWSER)/.installed: $(STAMP)
	@echo "Installing Playwright into $(BROWSER)"
	@rm -rf $(BROWSER)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --target $(BROWSER) 'playwright>=1.50,<2'
	@touch $@
