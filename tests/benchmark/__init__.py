"""Benchmarks: each prints a table and writes JSON; none is part of the test run. `make bench` runs most of them."""
