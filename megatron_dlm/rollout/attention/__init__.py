"""Attention of a pass over the paged cache: one interface, a backend per kernel library."""
