"""Benchmarks: commands that write JSON with the machine, versions and command line. Never timed tests."""
