"""Benchmarks, one claim a module: `dscompile bench NAME` runs `bench/NAME.py` and keeps its rows in `bench/results/`.

A benchmark module defines `run(quick=False) -> list[dict]` with rows of `case`, `us`, `anchor` and `anchor_us` (see
`bench.results.Row`), and `GPUS`, the number of CUDA devices it needs (1 when it says nothing, 0 for a claim that holds
on a CPU). Before it times anything it compares what it is about to time with a reference, through
`bench.results.check` or `check_close`: a run that checked nothing, or failed a check, is not written.
"""
