"""Small shared parts: errors, units, timing, command lines, reports, running halves of networks."""
