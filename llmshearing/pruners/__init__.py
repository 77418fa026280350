"""Pruners that choose without training masks. Each returns a Selection; the one fold applies it."""
