"""Tensors: quantizers, low-rank factors, packing, the compressed layer, the transformers plug-in, the worker."""
