"""Tests of megatron_dlm.rl."""
