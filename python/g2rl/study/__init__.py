"""``g2rl compare``: methods x tasks x seeds, trained one after another or side by side, and compared in one report."""
