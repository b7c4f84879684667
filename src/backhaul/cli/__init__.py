"""The command line: parse and print. No decisions."""
