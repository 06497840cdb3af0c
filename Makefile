# Two commands set up everything by themselves: make case-study, make test.
# PYTHON=... picks an interpreter; FMFL_DATA=... points the tests at real checkpoints and texts (see tests/conftest.py).

VENV := .venv
RUN := $(VENV)/bin/python
DATA := $(if $(FMFL_DATA),$(FMFL_DATA),$(wildcard ../shared/data))

.PHONY: case-study test clean

case-study: $(VENV)/ready
	$(RUN) -m launch.case_study --flagfile=launch/presets/case_study.flags

test: $(VENV)/ready
	FMFL_DATA="$(DATA)" $(RUN) -m pytest -rs

# The marker is made last, so a stopped installation is done again.
$(VENV)/ready: setup.cfg constraints.txt pyproject.toml tools/find_python.sh
	@python=$$(sh tools/find_python.sh $(PYTHON)) && \
	echo "setting up $(VENV) with $$python (about a minute, 1.5 GB)" && \
	$$python -m venv $(VENV) && \
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]" && \
	touch $@

clean:
	rm -rf $(VENV) runs
