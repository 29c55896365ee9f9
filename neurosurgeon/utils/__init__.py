"""Parts that every package may import: errors, units, timing, files, logs, metrics."""
