"""The program's version, the one that the package metadata names too (a test compares them)."""

VERSION = "0.1.0"
