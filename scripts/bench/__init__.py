"""Parts of the benchmarks: sizes, systems, measuring, roofline, tables."""
