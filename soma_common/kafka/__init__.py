"""The one edge to Kafka: everything that imports aiokafka lives here."""
