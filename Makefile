# Two commands: `make train` and `make test`. Both set everything up first, in .venv.
# ARGS goes to the script: make train ARGS="--preset nano-12m --out out12"

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: train test notebooks lint clean

train: $(VENV)/.run
	$(RUN) train.py $(ARGS)

test: $(VENV)/.test
	$(RUN) -m pytest $(ARGS)

# all notebooks, executed in their fast setting; the committed files stay as they are
notebooks: $(VENV)/.test
	$(RUN) -m pytest -m slow tests/test_notebooks.py

lint: $(VENV)/.test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf out .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -exec rm -rf {} +

$(VENV)/.run: requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.test: requirements-test.txt $(VENV)/.run
	$(RUN) -m pip install --quiet -r requirements-test.txt
	touch $@
