"""The operations as Triton kernels: no compiler is needed, neither to install nor to run them."""
