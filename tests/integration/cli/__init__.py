"""The somastack command on real servers."""
