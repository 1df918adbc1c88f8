"""The diffusion core: layouts, masking, unmasking, traces and plans. Pure tensors; no process groups, no model."""
