"""The collector: a central log of what all services recorded, to look things up in."""
