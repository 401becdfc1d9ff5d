"""Sweeps: many training runs, their measurements, tables and figures."""
