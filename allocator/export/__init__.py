"""A plan in the forms that other tools read. Numbers and text only; tensors are exported by the compressor."""
