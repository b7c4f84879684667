"""Mirrors: a directory of backup sets, file by file, at a store."""
