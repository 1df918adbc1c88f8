"""Tests of megatron_dlm.sft."""
