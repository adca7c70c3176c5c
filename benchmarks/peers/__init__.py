"""Other quantizers, each run as its authors ship it, for the comparisons of the folder above."""
