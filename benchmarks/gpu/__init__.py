"""The benchmark of the kernels for GPUs: every word at full size, against torch, cuDNN and others, and a copy.

`make bench-gpu`, or `python -m benchmarks.gpu` where torch and Triton are installed. Cases are data (`cases`); each is
checked against float64 (`truth`), timed with cold caches in interleaved rounds (`run`, on a `device`) against all who
are there (`contenders`, `others`), and held against what the kernels are to reach (`floors`). What a call costs the
host is in `host`; `output` writes and shows.
"""
