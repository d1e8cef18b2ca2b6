"""Parts of `trace_ground_truth.py`: scenes, where traces lead, swaps, tables, figures."""
