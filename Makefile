# Set-up is included in every target: a fresh clone needs Python 3.11 or newer and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FLOWER := $(VENV)-flower

.PHONY: demo test test-slow test-gpu test-flower test-ray chaos lint bench bench-gpu bench-encryption docs protos release clean

demo: $(STAMP)
	@$(BIN)/fedmosaic demo

# The whole fast suite: style, types, layering, then the tests. OpenMP is held to one thread per
# worker so that the two workers do not fight over the cores; texts are UTF-8 whatever the locale. The tests
# of a file stay with one worker while there are others for the second, so that what they share is made once.
test: $(STAMP) lint
	OMP_NUM_THREADS=1 PYTHONUTF8=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

# The slow tests, and the property tests with examples that nobody has tried yet.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow or hypothesis" --hypothesis-profile searching --timeout 1800

# The privacy tests that touch tensors, on the accelerator of this machine. Where there is none, pytest says so
# with exit code 5, which is no failure of the tests.
test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu || test $$? -eq 5

# Runs on Ray clusters of several nodes on this machine, which are lost; installs Ray.
test-ray: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[ray]'
	$(BIN)/python -m pytest tests/experiments/simulation/test_cluster.py

# Flower wants older versions of some packages: an environment of its own over that of the tests.
test-flower: $(FLOWER)/.installed
	$(FLOWER)/bin/python -m pytest tests/integrations/flower --timeout 900

$(FLOWER)/.installed: $(STAMP)
	$(BIN)/python -m venv --clear $(FLOWER)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"), "$(CURDIR)/src", sep="\n")' \
	  > "$$(echo $(FLOWER)/lib/python3*/site-packages)/fedmosaic.pth"
	$(FLOWER)/bin/python -m pip install --disable-pip-version-check 'flwr[simulation]>=1.41,<1.43'
	touch $@

# Processes killed at random moments, and mutated messages and files: make chaos [HOURS=8] [SEED=… [RUN=…]]
# [KILLS=1000] [MESSAGES=100000], of each call and of each format; [GUIDED=30] seconds of each by atheris.
chaos: $(STAMP)
	OMP_NUM_THREADS=1 PYTHONUTF8=1 PYTHONPATH=tests $(BIN)/python -m chaos \
	  $(if $(HOURS),--hours $(HOURS)) $(if $(KILLS),--kills $(KILLS)) $(if $(SEED),--seed $(SEED)) $(if $(RUN),--run $(RUN)) \
	  $(if $(MESSAGES),--messages $(MESSAGES))
	$(if $(GUIDED),OMP_NUM_THREADS=1 PYTHONUTF8=1 PYTHONPATH=tests $(BIN)/python -m chaos.guided $(GUIDED))

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# MODEL is a folder with a pretrained model, for example one that `make demo` left in ~/.cache/fedmosaic/models.
bench: $(STAMP)
	@test -n "$(MODEL)" || { echo "say make bench MODEL=/folder/of/a/model"; exit 1; }
	$(BIN)/python -m benchmarks.steps $(MODEL) --memory

# On an accelerator; MODEL as above, for example the whole SmolLM2 that `make demo` left there. Ratios of steps,
# memory of a large model, and a whole federation.
bench-gpu: $(STAMP)
	@test -n "$(MODEL)" || { echo "say make bench-gpu MODEL=/folder/of/a/model"; exit 1; }
	for dtype in float32 bfloat16; do \
	  for steps in "colora private" "colora --batch 16 --tokens 256" "profile --batch 256 --tokens 64"; do \
	    $(BIN)/python -m benchmarks.steps $(MODEL) --device auto --dtype $$dtype --kinds $$steps || exit 1; \
	  done; \
	done
	$(BIN)/python -m benchmarks.gpu
	$(BIN)/fedmosaic demo --rounds 3 --output-dir runs/gpu/demo

bench-encryption: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.encryption --note docs/encryption-benchmark.md >/dev/null

# The reference of all settings, from the models that read them.
docs: $(STAMP)
	$(BIN)/python docs/configuration.py

protos: $(STAMP)
	$(BIN)/python protos/generate.py

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "FedMosaic needs Python 3.11 or newer; run make PYTHON=/path/to/python3.11"; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV); the first time about 1 GiB is fetched, PyTorch most of it, in two minutes or more"
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# Wheel and sdist of this commit, built twice and tried; see deploy/release.sh.
release:
	PYTHON=$(PYTHON) bash deploy/release.sh

clean:
	rm -rf $(VENV) $(FLOWER) runs .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
