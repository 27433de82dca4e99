"""Studies behind a figure in the documentation, each rerun by one command."""
