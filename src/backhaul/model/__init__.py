"""Frozen values that the layers above pass to each other. No I/O, no behaviour beyond arithmetic."""
