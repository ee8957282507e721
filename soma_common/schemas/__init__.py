"""Avro schemas from payload models, and the registry that keeps them."""
