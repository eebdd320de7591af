"""The built-in text-to-image world: captions, scenes, pictures, an exact checker and the small FLUX trained on them."""
