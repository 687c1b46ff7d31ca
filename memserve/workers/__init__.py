"""The worker process: an I/O thread, an engine loop, and the rules that join them."""
