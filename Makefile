# The commands of this repository. Everything runs from its root, in environments that these targets make themselves.
#
#   make demo [SEED=0] [GYM=nemo]   train a tiny policy end to end on this machine's CPU; on NeMo Gym's own servers
#   make test            set up both environments and run the suite   (test-fast: no vLLM, no Gym; test-full: all of it)
#   make check           formatter, linter and type checker
#   make mutants         put faults into copies of the code, and see the tests catch them (MUTANTS="splice: ..." for some)
#   make docs  bench  setup  setup-gym  clean

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

SEED ?= 0
# Who plays the demo: `embedded`, or `nemo` for NeMo Gym itself.
GYM ?= embedded
PYTEST_ARGS ?=
# Processes that run tests.
JOBS ?= 2
MUTANTS ?=

# The one address that may be needed beside pip's own configuration: PyPI carries no CPU build of torch.
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

VENV := .venv
VENV_GYM := .venv-gym
READY := $(VENV)/.ready
READY_GYM := $(VENV_GYM)/.ready
READY_DOCS := $(VENV)/.ready-docs
LOCK := requirements/cpu-py311.lock
LOCK_GYM := requirements/gym-py312.lock
LOCK_DOCS := requirements/docs.lock
TORCH := $(shell sed -n '/^torch==/p' $(LOCK))
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
PIP_GYM := $(VENV_GYM)/bin/python -m pip --disable-pip-version-check
QUIET := --quiet --quiet --progress-bar off

# Nothing that runs from here asks a hub for a file or reports its use.
export DO_NOT_TRACK := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export VLLM_DO_NOT_TRACK := 1
export VLLM_NO_USAGE_STATS := 1

# $(call find_python,MINORS): a Python 3 of the first of these minor versions that runs and can make an environment,
# on PATH or under pyenv (whose commands on PATH fail for a version that is installed but not selected).
find_python = for minor in $(1); do \
    for python in python3.$$minor python3 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.$$minor.*/bin/python; do \
      if "$$python" -c "import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, $$minor))" 2>/dev/null; then \
        echo "$$python"; exit; \
      fi; \
    done; \
  done

# $(call make_venv,FOLDER,MINORS,WORDS): an environment of its own, or a sentence that says which Python is missing.
make_venv = test -x $(1)/bin/python || { \
    python=$$($(call find_python,$(2))); \
    test -n "$$python" || { \
      echo "$(1) needs $(3) with its venv module, and none was found on PATH or under pyenv." >&2; \
      echo "Install one ('pyenv install 3.$(firstword $(2))', or your system's python3.$(firstword $(2)) and python3.$(firstword $(2))-venv) and repeat." >&2; \
      exit 1; \
    }; \
    echo "$(1): $$("$$python" --version) from $$python"; \
    "$$python" -m venv $(1); \
  }

.PHONY: help setup setup-gym demo test test-fast test-full mutants check docs bench clean

help:
	@sed -n 's/^#   //p' Makefile

setup: $(READY)

setup-gym: $(READY_GYM)

# torch comes first, by its exact build: from the wheel directories or indexes that pip is configured with, else from
# TORCH_CPU_INDEX. The rest is installed without resolving anything, so nothing can bring another torch; what the
# three checks refuse is an environment that somebody added to.
$(READY): $(LOCK) pyproject.toml
	@$(call make_venv,$(VENV),11,Python 3.11)
	@echo "$(VENV): installing $(LOCK) (about a minute)"
	@$(PIP) install $(QUIET) --no-deps "$(TORCH)" 2>/dev/null || { \
	  echo "$(VENV): pip's own sources have no $(TORCH); asking $(TORCH_CPU_INDEX)"; \
	  $(PIP) install $(QUIET) --no-deps -i $(TORCH_CPU_INDEX) "$(TORCH)"; \
	}
	@$(PIP) install $(QUIET) --no-deps -r $(LOCK)
	@$(PIP) install $(QUIET) --no-deps --no-build-isolation --editable .
	@$(PIP) freeze | grep -x "$(TORCH)" >/dev/null || { echo "$(VENV) holds another torch than $(TORCH): make clean" >&2; exit 1; }
	@! $(PIP) freeze | grep -E '^(torchaudio|torchcodec|torchvision|triton)==' || { \
	  echo "$(VENV) must not hold these (see $(LOCK)): make clean" >&2; exit 1; }
	@! $(PIP) check | grep -vE 'requires (torchaudio|torchcodec|torchvision|triton), which is not installed|No broken' || { \
	  echo "$(VENV) does not fit together: complete $(LOCK), or make clean" >&2; exit 1; }
	@touch $@

$(READY_GYM): $(LOCK_GYM)
	@$(call make_venv,$(VENV_GYM),12 13,Python 3.12 or newer)
	@echo "$(VENV_GYM): installing $(LOCK_GYM) (about two minutes)"
	@$(PIP_GYM) install $(QUIET) --no-deps -r $(LOCK_GYM)
	@! $(PIP_GYM) check | grep -v 'No broken' || { \
	  echo "$(VENV_GYM) does not fit together: complete $(LOCK_GYM), or make clean" >&2; exit 1; }
	@touch $@

$(READY_DOCS): $(LOCK_DOCS) $(READY)
	@$(PIP) install $(QUIET) --no-deps -r $(LOCK_DOCS)
	@touch $@

# The same recipe on either; what differs is who serves the environment.
DEMO_embedded := gym=embedded output_dir=outputs/demo
DEMO_nemo := gym=nemo_light output_dir=outputs/demo-nemo
DEMO_OUT = $(patsubst output_dir=%,%,$(filter output_dir=%,$(DEMO_$(GYM))))

demo: $(READY) $(if $(filter nemo,$(GYM)),$(READY_GYM))
	@test -n "$(DEMO_$(GYM))" || { echo "GYM=$(GYM): expected embedded or nemo" >&2; exit 1; }
	$(VENV)/bin/lightning-gym warm-start counter --seed $(SEED)
	$(VENV)/bin/lightning-gym train recipe=counter seed=$(SEED) $(DEMO_$(GYM))
	@$(VENV)/bin/lightning-gym report $(DEMO_OUT)

# The suite's tiers: see the markers in pyproject.toml. Files of tests are dealt to JOBS processes of one core each;
# what `full` runs is bounded in time by the machine's whole speed, and has it to itself.
PYTEST := $(VENV)/bin/python -m pytest
PYTEST_JOBS = OMP_NUM_THREADS=1 $(PYTEST) -n $(JOBS) --dist loadfile

test-fast: $(READY)
	@$(PYTEST_JOBS) $(PYTEST_ARGS)

test: $(READY) $(if $(shell grep -rlE 'mark[.]gym' tests),$(READY_GYM))
	@$(PYTEST_JOBS) -m "not full" $(PYTEST_ARGS)

test-full: $(READY) $(READY_GYM)
	@$(PYTEST) -m "" $(PYTEST_ARGS)

mutants: $(READY)
	@$(VENV)/bin/python -m tests.mutants $(MUTANTS)

check: $(READY)
	@$(VENV)/bin/ruff format --check --quiet .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/pyright

docs: $(READY_DOCS)
	@$(VENV)/bin/sphinx-build -W --keep-going --quiet -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: $(READY)
	$(VENV)/bin/lightning-gym bench all

# Removes what these targets made, environments included; files you made by hand under outputs/ go too.
clean:
	rm -rf $(VENV) $(VENV_GYM) outputs docs/_build dist .pytest_cache .ruff_cache .hypothesis
