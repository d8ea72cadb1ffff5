"""How a cluster comes to be, and whether this machine is ready for one."""
