"""Sweeps over normalization x learning rate: requests, trials, records, verdict.

Importing this package loads no optional dependency; `normwise.study.tune` is the entry.
"""
