"""The somastack command without servers."""
