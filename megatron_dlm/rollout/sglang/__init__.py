"""SGLang as a rollout backend, in an interpreter of its own.

Two processes, two sets of packages. Modules marked (child) are imported in SGLang's interpreter, which has neither
megatron-core nor this package's other needs; the rest belongs to the trainer, which has no SGLang.

    client    the engine as the trainer sees it         plugin     what SGLang loads (child)
    process   starts and ends the child                 algorithm  the denoising step in SGLang's terms (child)
    protocol  messages between the two (both)           denoise    the decisions, pure tensors (child)
    weights   from training shards to tensors           server     the child's main loop (child)
    check     what cannot work, before anything runs    tensors    buckets in SGLang's format (child)
    wire      requests and answers as plain data (both)
"""
