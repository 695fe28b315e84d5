"""One file per table or figure; each calls `train`. `python -m experiments.NAME --help` says what it does."""
