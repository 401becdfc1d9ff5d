"""The command `spiking-mlp`: it parses, calls the library and prints."""
