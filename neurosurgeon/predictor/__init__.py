"""Predict the latency of layers: data sets, features, fitted models, measured profiles, online corrections."""
