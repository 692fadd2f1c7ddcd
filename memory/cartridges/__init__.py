"""Trained KV prefixes: what one is, its files, who may serve it, and how it comes into memory."""
