"""Times the operators against other implementations and against what the machine could do at best.

`ssmtune bench` runs it; the benchmarks of a checkout are built from the same pieces.
"""
