"""Real servers for tests: the pytest plugin, the choice of backend, the local process lane and a cutting proxy."""
