"""Measurements; each prints what it measured and is quoted only with its command."""
