"""The somastack command."""
