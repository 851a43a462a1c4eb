"""Time, memory and error of a candidate, and the machine they were read on."""
