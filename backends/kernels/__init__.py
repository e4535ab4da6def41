"""Triton kernels for what stands around an exchange, each with its torch reference (docs/kernels.md).

Every operator here runs its reference wherever its kernel cannot run: on the CPU, on dtypes that Triton does not
know, on tensors of more than four dimensions. Importing this needs neither Triton nor a GPU.
"""
