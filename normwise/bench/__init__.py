"""The benchmark: every layer against torch's, and against a copy of the same bytes, on this machine.

`normwise bench` is its command. Cases are data (`cases`), each is prepared (`operations`, `models`), checked against
float64 (`gate`), timed in interleaved rounds (`timing`), recorded (`results`), and shown (`screen`, `page`).
"""
