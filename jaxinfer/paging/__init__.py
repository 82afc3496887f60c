"""Paging of parameters: layers live in host memory or on disk, and stream through the devices while others compute."""
