"""Several runs side by side: which ones belong together, their curves and their final results."""
