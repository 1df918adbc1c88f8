"""Tests of megatron_dlm.evaluation."""
