"""Latency prediction: data sets, features, fitted models, and the search for the best cut."""
