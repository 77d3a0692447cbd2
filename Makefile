# `make demo` shows what narrow heads cannot do in a few minutes on two CPU cores; `make test` runs the tests;
# `make figures` and `make tables` make the pictures and the tables of results/ and README.md again from the records.
# Each makes its own virtual environment in .venv first. PYTHON chooses the interpreter (3.11 or newer).

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo forecast test robustness figures tables docs lint interpreter chronos clean

demo: .venv/ready
	$(BIN)/python scripts/demo.py

# what comes after the end of a CSV of yours: make forecast CSV=sales.csv, also HORIZON=24 (rows) and PREPARE=--missing=forward
CSV_NAME = $(firstword $(subst ., ,$(notdir $(CSV))))
forecast: .venv/ready
	@test -n "$(CSV)" || { echo "error: name a file: make forecast CSV=sales.csv" >&2; exit 2; }
	$(BIN)/python data/csv/prepare.py --input "$(CSV)" $(PREPARE)
	$(BIN)/python scripts/own_series.py --dataset="$(CSV_NAME)" $(if $(HORIZON),--horizon=$(HORIZON))

test: .venv/ready
	$(BIN)/python -m pytest

# the long form of tests/test_robustness.py: kills, signals, double starts, damage and bad inputs, counted; a quarter of an hour
robustness: .venv/ready
	$(BIN)/python tests/robustness.py

# every picture of results/, each also by its name: make results/lm_scaling.png
FIGURES := $(addprefix results/,$(addsuffix .png,recall language_modeling icl_examples lm_scaling lm_curves lm_levels \
	lm_levels_256 attention_speed ts_horizon ts_forecasts))
LM := results/language_modeling
EIGHT_LEVELS := --only block_size=1024 --only "mlr_rank_list=32|8|6|4|4|4|4|2"

figures: $(FIGURES)

.PHONY: $(FIGURES)
$(FIGURES): .venv/ready

results/recall.png:
	$(BIN)/python plots/demo.py results/demo --out results

results/language_modeling.png: results/recall.png

results/icl_examples.png:
	$(BIN)/python plots/icl_examples.py results/icl_regression/*_n16_*_lr5e-05_* results/icl_regression/*_n64_* --unfinished --out $@

results/lm_scaling.png:
	$(BIN)/python plots/lm_compute.py $(LM)/*_lr0.003_seed[12] --only max_iters=10000 $(EIGHT_LEVELS) --fit --x=non_emb_compute --x=gpu_seconds --out $@

results/lm_curves.png:
	$(BIN)/python plots/lm_curves.py $(LM) --only max_iters=100000 --only "validation=random windows" --out $@

results/lm_levels.png:
	$(BIN)/python plots/lm_levels.py results/lm_levels --out $@

results/lm_levels_256.png:
	$(BIN)/python plots/lm_levels.py $(LM)/*_d256_lr0.003_seed1 --only token_mixing_struct=low_rank --only token_mixing_struct=multi_level_low_rank --only block_size=1024 --out $@

results/attention_speed.png:
	$(BIN)/python plots/attention_speed.py results/bench/attention_h200.json --out $@

results/ts_horizon.png:
	$(BIN)/python plots/ts_horizon.py results/time_series --out $@

results/ts_forecasts.png:
	$(BIN)/python plots/ts_forecasts.py results/ts_forecasts.json --out $@

# the tables of README.md and results/README.md, and results/ts_table.md; `plots/readme.py --check` compares
tables: .venv/ready
	$(BIN)/python plots/readme.py
	$(BIN)/python plots/ts_table.py results/time_series results/chronos > results/ts_table.md

# the API of structured/ as HTML pages in out/docs
docs: .venv/ready
	$(BIN)/python -c 'import pdoc' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check pdoc==16.0.0
	$(BIN)/python -m pdoc --docformat google -o out/docs structured structured.mlbtc structured.reference
	@echo out/docs/structured.html

lint: .venv/ready
	$(BIN)/ruff check .

# torch is named first, so that nothing pulls in another build of it
.venv/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep ^torch== requirements.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# Triton, whose interpreter runs the kernel tests where there is no GPU; with PyTorch for CUDA it is there already
interpreter: .venv/ready
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet --no-deps triton==3.9.0

# what train_chronos.py and its tests need
chronos: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-chronos.txt

clean:
	rm -rf .venv out
