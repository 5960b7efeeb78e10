"""A GPU that computes nothing, so that everything around its kernels can be tried and counted where there is none.

PyTorch, its allocator and Triton believe in one H200. Models are built there, steps taken, kernels compiled; what
numbers come out means nothing. So this shows

- whether a command works on a GPU at all: no tensor left on the host, no step that waits for the device;
- how much memory a step takes: the allocator is PyTorch's own and depends on no numbers (see `libraries.c` for what
  the libraries would add);
- how many kernels a step launches, and how long the host is busy with that.

It shows nothing about results, nor how long a GPU would take; an evaluation, which divides by counts, can't be had.
See `device.c` for how it is done.
"""
