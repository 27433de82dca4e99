"""Scenarios, tasks, the demo and the command line: everything that uses the other rooms."""
