"""Stages one after the other, from one description: what they are, where a run of them stands, how it goes on."""
