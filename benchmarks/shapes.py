"""The sizes that are measured."""

from ssmtune.measure.inputs import Shape

# dim 1536 is Mamba-130m (width 768, expanded twice); 4096 is Mamba-1.4b.
MAIN = (Shape(1, 1536, 512), Shape(4, 1536, 512), Shape(1, 1536, 2048), Shape(1, 4096, 1024))
QUICK = (Shape(1, 256, 128),)
QUADRATIC = (Shape(1, 384, 64), Shape(1, 384, 128), Shape(1, 384, 256))
"""Short enough for a scan whose backward pass takes time quadratic in seqlen."""

MEMORY = Shape(1, 1536, 2048)
LENGTHS = tuple(Shape(1, 1536, 2**power) for power in (10, 12, 13, 14, 15, 16))
"""With MAIN these are all powers of two from 512 to 65,536."""

QUICK_LENGTHS = tuple(Shape(1, 64, 2**power) for power in range(7, 11))
