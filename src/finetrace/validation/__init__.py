"""Validating an index by retraining: what is run, and its tables and figures."""
