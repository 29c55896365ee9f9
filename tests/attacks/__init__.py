"""Attacks that can be run: each does harm to a naive server (`naive.py`), and must do none to ours."""
