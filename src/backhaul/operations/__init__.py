"""The verbs: wiring and order. Read these first; what they are made of lies in the folders below."""
