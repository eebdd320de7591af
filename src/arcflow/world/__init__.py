"""The built-in text-to-image world: captions, scenes, images, an exact checker and the small FLUX trained on them."""
