"""What all benchmarks measure with: clocks, peaks of memory, processes of their own, JSON."""
