"""Measurements; each prints what it measured and is quoted only with its command. See README.md beside this file."""
