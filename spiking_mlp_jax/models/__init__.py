"""The network: configuration, topology, layers, weights, names."""
