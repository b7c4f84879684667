"""Bounded concurrency and nothing else: threads that end together, buffers, ordered work, queues, a tee.

Everything here moves plain callables and bytes; it knows no store, no transform and no format. Threads,
not asyncio: the work below (compression, hashing, sockets) releases the GIL.
"""
