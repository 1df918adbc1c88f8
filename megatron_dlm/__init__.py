"""megatron_dlm: block-diffusion language models trained with Megatron parallelism, from supervised fine-tuning to
TraceRL.
"""

__version__ = "0.1.0"
