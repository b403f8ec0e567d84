# make demo   fold a real network and look at a photograph with it, before and after
# make test   the tests                  make fuzz   tens of thousands of random models
# make lint   style and types            make plant  plants bugs and shows that the tests find them
# make docs   the documentation                  make examples  the examples, with what they need

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test fuzz plant lint docs examples clean

demo: $(INSTALLED)
	@echo "fxfuse demo: EfficientNet-Lite0 with its ImageNet weights"
	@$(BIN)/fxfuse demo

test: $(INSTALLED)
	@echo "running the tests on two cores"
	@$(BIN)/python -m pytest -n 2 --dist worksteal

fuzz: $(INSTALLED)
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest -n 2 tests/test_properties.py

plant: $(INSTALLED)
	$(BIN)/python -m tests.planted_bugs

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs docs/_build
	@echo "docs/_build/index.html"

examples: $(INSTALLED)
	$(BIN)/python -m pip install --progress-bar off --quiet -c constraints.txt -e '.[examples]'
	$(BIN)/python -m pytest tests/test_examples.py

$(INSTALLED): pyproject.toml constraints.txt
	@echo "making .venv and installing what constraints.txt pins (a few minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --progress-bar off --quiet -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis docs/_build
