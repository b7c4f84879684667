"""Compress and digest: feed bytes, take results. One object per thread; they hold no locks and do no I/O."""
