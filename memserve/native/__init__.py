"""C and C++ sources, compiled once on the machine that runs them, and called through ctypes."""
