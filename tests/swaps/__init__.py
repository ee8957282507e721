"""Blue-green swaps under load, one after the other, each compared with a full recompute. See ``__main__``."""
