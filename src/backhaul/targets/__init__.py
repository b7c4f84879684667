"""Where streams go back to."""
