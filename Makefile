# make demo: convert a real model and show the result.  make bench: speed beside the donor.  make test / make lint: what CI runs.
# make fuzz: damaged inputs of every kind for an hour.  make faults: each command killed at every change of a file.
# make test-vllm: exports in a real vLLM, installed into .venv-vllm; fills the engines' table of the documentation.
# make test-llamacpp: exports in llama.cpp's server, installed into .venv-llamacpp; fills the same table.
# make gpu-inputs: what a GPU machine without network needs, into gpu_inputs/.  make gpu: everything that it should be asked, there.
# make figures: tables and plots of README and docs from benchmarks/*.json.
# make docs: the documentation into site/.
# Needs python3 >= 3.11 and nothing else; everything is installed into .venv.

PYTHON ?= python3
BIN := .venv/bin
SOURCES := mhconvert convert cli eval heal hub run tests benchmarks docs examples
DEMO := demo/smollm2-135m-mla

DATA ?= $(MHCONVERT_DATA)
GPU_PYTHON ?= $(PYTHON)
GPU_OPTIONS ?= --out gpu_results

.PHONY: demo bench gpu gpu-inputs test test-vllm test-llamacpp fuzz faults lint format figures docs clean

demo: .venv/installed
	$(BIN)/mhconvert smollm2-135m --to mla --kv-budget 0.125 --effort quick --calibration-tokens 8192 -o $(DEMO) --force
	@echo
	@echo '$$ mhconvert generate $(DEMO) --chat "How do plants make food?"'
	@$(BIN)/mhconvert generate $(DEMO) --chat "How do plants make food?" --max-new-tokens 40
	@echo
	@echo '$$ mhconvert eval $(DEMO) --suite quick'
	@$(BIN)/mhconvert eval $(DEMO) --suite quick --quiet --report $(DEMO).html
	@echo '$(DEMO).html shows the same in a browser'

bench: .venv/installed-dev
	PYTHONPATH=. $(BIN)/python benchmarks/speed_table.py bench
	$(BIN)/python benchmarks/figures.py
	@cat benchmarks/speed.json

gpu:
	PYTHONPATH=. $(GPU_PYTHON) benchmarks/gpu_run.py $(GPU_OPTIONS)

gpu-inputs: .venv/installed
	@test -n "$(DATA)" || { echo 'gpu-inputs: say where texts, sets and checkpoints are: DATA=FOLDER'; exit 2; }
	rm -rf build/gpu_wheels
	$(GPU_PYTHON) -m pip wheel --quiet --no-deps -w build/gpu_wheels -r benchmarks/gpu_wheels.txt
	PYTHONPATH=. $(BIN)/python benchmarks/gpu_pack.py gpu_inputs --donor smollm2-135m --wheels build/gpu_wheels \
	  --small $(DATA)/checkpoints/stories260k-gqa --text $(DATA)/eval/wikitext2/wiki.test.raw --data $(DATA)/eval \
	  --calibration $(DATA)/calib/openstax-*.jsonl $(DATA)/calib/classic-books.jsonl

test: .venv/installed-dev
	$(BIN)/python -m pytest -n auto --dist loadfile

fuzz: .venv/installed-dev
	OMP_NUM_THREADS=1 TQDM_DISABLE=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.fuzz

faults: .venv/installed-dev
	MHCONVERT_KILLS=all $(BIN)/python -m pytest -n auto tests/faults

test-vllm: .venv/installed-dev .venv-vllm/installed
	MHCONVERT_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python MHCONVERT_ENGINES=benchmarks/engines.json VLLM_CPU_KVCACHE_SPACE=1 \
	  $(BIN)/python -m pytest tests/engines
	$(BIN)/python benchmarks/figures.py

test-llamacpp: .venv/installed-dev .venv-llamacpp/installed
	MHCONVERT_LLAMA_SERVER=$(CURDIR)/.venv-llamacpp/bin/llama-server MHCONVERT_ENGINES=benchmarks/engines.json \
	  $(BIN)/python -m pytest tests/engines
	$(BIN)/python benchmarks/figures.py

lint: .venv/installed-dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy -p mhconvert

format: .venv/installed-dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

figures: .venv/installed-dev
	$(BIN)/python benchmarks/figures.py

docs: .venv/installed-docs
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv .venv-vllm .venv-llamacpp demo bench gpu_inputs gpu_results site build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "mhconvert needs Python 3.11 or newer and '$(PYTHON)' is not; try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; \
	  echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[eval]'
	@touch $@

.venv/installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@ .venv/installed

.venv-vllm/installed: tests/engines/vllm_environment.py | .venv/bin/python
	$(BIN)/python tests/engines/vllm_environment.py .venv-vllm
	@touch $@

.venv-llamacpp/installed: tests/engines/llamacpp_environment.py | .venv/bin/python
	$(BIN)/python tests/engines/llamacpp_environment.py .venv-llamacpp
	@touch $@

.venv/installed-docs: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	@touch $@
