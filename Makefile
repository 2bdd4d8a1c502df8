.PHONY: fast test slow lint docs

fast:  ## a verdict in under a minute
	python -m pytest -m fast

test:  ## what the README's test command runs
	python -m pytest

slow:  ## the longer proofs
	python -m pytest -m slow

lint:  ## style and types
	ruff check .
	ruff format --check .
	pyright

docs:  ## the pages that are written from the code
	python -m qgalore.config.reference > docs/configuration.md
