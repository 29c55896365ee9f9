"""Latency prediction: data sets, features, fitted models, and the search for the best cut."""

import utils  # noqa: F401  # it sets how threads wait, before torch is imported
