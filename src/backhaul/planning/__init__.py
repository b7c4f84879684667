"""Pure decisions: values in, values out. No I/O, no threads, no clock (times come in as arguments)."""
