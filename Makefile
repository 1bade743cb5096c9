# Every target does all of its own set-up. What each one is for: CONTRIBUTING.md.
.DEFAULT_GOAL := help
.PHONY: help run test build wasi test-wasi check format lab soak fuzz bench wheel clean
SHELL := /bin/sh
PYTHON := .venv/bin/python
CARGO := tools/cargo.sh

help: ## these lines
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 18

run: build ## the main job on real traffic: bytes and packets through a TLS bridge, beside an asyncio pump
	@.venv/bin/sapper demo

test: build ## every test, Rust first
	@tools/system-packages.sh
	@echo "Rust tests (the first time they are compiled too, one to two minutes)"
	@$(CARGO) test --release
	@echo "Rust tests that take longer: more than 2^24 records"
	@$(CARGO) test --release --lib -- --ignored long_
	@echo "Python tests, side by side"
	@$(PYTHON) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

build: ## the environment in .venv and the native module in python/sapper
	@tools/build.sh

wasi: ## the host for wasm guests in .venv, and the guests of the examples and tests; minutes
	@tools/build-wasi.sh

test-wasi: wasi ## their tests: not part of `make test`, because they take so long to compile
	@tools/system-packages.sh
	@$(CARGO) clippy --release --quiet -p sapper-wasi -p sapper-wasi-py --all-targets -- -D warnings
	@$(CARGO) test --release -p sapper-wasi
	@$(PYTHON) tools/check_stubs.py sapper_wasi._native
	@$(PYTHON) -m pytest tests/wasi tests/cli/test_wasi_cli.py

check: build ## formatting, lints, types, stubs
	@tools/check.sh

format: ## rewrite the sources as the formatters want them
	@tools/setup-env.sh
	@cargo fmt --all
	@.venv/bin/ruff check --fix-only --quiet .
	@.venv/bin/ruff format --quiet .

lab: build ## real traffic between network namespaces alone; needs root
	@tools/system-packages.sh
	@CI=true $(PYTHON) -m pytest tests/lab

soak: build ## 10,000 bridges, 10,000 streams, real programs with long cuts; minutes
	@tools/system-packages.sh
	@$(PYTHON) tools/soak.py
	@$(PYTHON) -m pytest -m soak

fuzz: ## every parser against random input; FUZZ_SECONDS=30 for each
	@tools/fuzz.sh

bench: build ## the figures of README.md; minutes; fails when a floor is missed
	@$(PYTHON) -m benches

wheel: ## a wheel for this platform, in dist/
	@tools/setup-env.sh
	@.venv/bin/maturin build --release --strip --out dist

clean: ## everything that can be made again
	rm -rf .venv target dist .pytest_cache .mypy_cache .ruff_cache .hypothesis python/sapper/*.so
	find python -name __pycache__ -prune -exec rm -r {} +
