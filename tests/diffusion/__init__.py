"""Tests of the diffusion core, and the slow obvious oracles they are held to."""
