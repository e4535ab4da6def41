"""The compiler broken on purpose, one place at a time: ``python -m tests.mutants [--only WORDS]``."""
