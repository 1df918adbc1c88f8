"""A GPU of the mind, for hosts without one: tensors that say they are on cuda:0 and compute on the CPU.

What a real one would refuse is refused: operations over tensors of two devices, a tensor of the wrong device in a
collective, a tensor on it turned into numpy. What makes the host wait for it is written down, with the functions of
this package that asked for it; and while a CUDA graph is captured nothing may. A graph that was captured is replayed by
doing the captured operations again, on the same memory.

    python -m tests.pretend_gpu                      a command server (command_server.py) on it
    python -m tests.pretend_gpu.run MODULE ...       a program on it

It has no kernels of its own: attention that torch compiles for GPUs is computed by the rule of its mask, torch.compile
does nothing, Triton's kernels run in Triton's interpreter, FlashAttention 3 is a stand-in, and of Transformer Engine,
where it can be imported, what is compiled is plain torch (te_kernels.py). Streams and events have always been waited
for, and there is no memory to run out of. A process that is shown no GPU (CUDA_VISIBLE_DEVICES is empty) has none.

A child of the server whose environment names a file in PRETEND_GPU_WAITS writes there, when it ends, what it waited
for: a list of [kind, functions from the inside out, how often].
"""
