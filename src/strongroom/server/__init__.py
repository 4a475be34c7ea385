"""The HTTP server: keys, usage and entities over version 1 of the interface."""
