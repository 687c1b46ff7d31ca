"""memserve: one command turns a machine into one LLM server that wastes no computed token."""

__version__ = "0.1.0"
