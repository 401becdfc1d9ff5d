"""Datasets, augmentation and the input pipeline."""
