"""How it is measured and shown. Imports nothing else of the benchmarks."""
