"""The outbox: rows written with the events, and the relay that brings them to Kafka."""
