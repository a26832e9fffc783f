PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Written last, so that an installation that was interrupted is begun again.
READY := $(VENV)/.ready
# Apart, because PEFT imports what it finds of these at every start, and they are slow and noisy to import.
QUANTIZATION := $(VENV)/.quantization

.PHONY: demo test conformance lint docs clean

demo: $(READY)  ## teach SmolLM2-135M the facts of examples/edits.jsonl, anew into demo_output/
	rm -rf demo_output
	$(BIN)/python -m peft_locft.demo --edits examples/edits.jsonl --output demo_output

test: $(READY) $(QUANTIZATION) lint  ## all that CI runs
# One thread each: several threads that share a core wait for each other.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=10 -n logical --maxprocesses 4 --dist loadfile
	$(BIN)/python tests/conformance/run.py
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

conformance: $(READY)  ## PEFT's own test suite on LocFT, with the reasons of what is skipped
	$(BIN)/python tests/conformance/run.py -rs

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(READY)  ## the site, in docs/_build/html
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

$(READY): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

$(QUANTIZATION): $(READY)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[quantization]"
	touch $@

clean:
	rm -rf $(VENV) .conformance demo_output docs/_build
