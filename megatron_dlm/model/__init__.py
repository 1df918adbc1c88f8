"""The block-diffusion transformer: megatron-core's GPTModel with our positions, attention, norm and head."""
