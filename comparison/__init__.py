"""What compare.py and the benchmarks share: cells, how they are run, the report, and other people's samplers."""
