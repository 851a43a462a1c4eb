"""Measurements of the ops against the machine's own matrix product and against other implementations."""
