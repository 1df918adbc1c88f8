"""Tests of megatron_dlm.model."""
