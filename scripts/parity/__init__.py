"""Reference outputs of the official networks and schedulers, which `tests/parity` compares with."""
