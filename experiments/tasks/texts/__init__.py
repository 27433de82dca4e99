"""Text tasks: sources and sets."""
