"""The means of timing: clocks, checks of equality, devices, memory, peers, command lines."""
