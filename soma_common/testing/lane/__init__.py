"""Servers as ordinary processes on loopback: no container engine, no system service, no root needed."""
