"""Supervised fine-tuning of block-diffusion models."""
