"""Measures of a model in training that leave no trace, and the doctor that reads them."""
