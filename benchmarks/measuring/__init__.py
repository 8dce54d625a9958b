"""Tools of all benchmarks: clocks, peak memory, separate processes, JSON."""
