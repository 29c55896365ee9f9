"""Command lines: flags, exit codes, and the body of every script."""
