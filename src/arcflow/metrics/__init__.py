"""Measures of images and sets of images, as functions of tensors and arrays."""
