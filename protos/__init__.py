"""The wire: protocol buffers, bounded binary records, and the errors every room shares."""
