"""Firing rates, spike trains, membrane potentials and their similarity over time steps."""
