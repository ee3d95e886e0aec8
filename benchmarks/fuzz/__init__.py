"""Random inputs and files against the library: `python -m benchmarks.fuzz.run` (`make fuzz`)."""
