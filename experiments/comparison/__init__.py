"""Runs side by side: tables, figures and the page of `fedmosaic report`. Reads finished runs, starts none."""
