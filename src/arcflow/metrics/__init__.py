"""Measures of pictures and sets of pictures, as functions of tensors and arrays."""
