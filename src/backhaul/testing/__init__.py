"""What tests, the demo and the benchmark are made of: real servers, data, stores, the conformance suite.

Shipped with the package so that whoever writes a store can hold it to the same suite.
"""
