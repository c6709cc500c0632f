"""Encoders: a view in, latents out."""
