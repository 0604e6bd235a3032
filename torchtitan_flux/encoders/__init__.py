"""Frozen encoders: pixels to latents (codecs), captions to features (T5, CLIP).

Kept free of imports so that a caller who needs one of them does not load the others' libraries.
"""
