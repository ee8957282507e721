"""The event log itself as a source of events, for running without a broker."""
