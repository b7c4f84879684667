"""Tools of the project itself: set-up, and the pages that are made from the code."""
