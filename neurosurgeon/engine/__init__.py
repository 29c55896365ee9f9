"""Engines run partitions: torch, and later others."""
