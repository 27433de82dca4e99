"""DP-SGD on the shared branch and the checks before it; stands on model and colora, its caller books."""
