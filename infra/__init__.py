"""Where jobs run: a local head node, a cluster of several hosts on one machine, and the checks before a start."""
