"""Measurements, and checks of a device: docs/performance.md says how to run them."""
