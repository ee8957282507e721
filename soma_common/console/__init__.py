"""The web console: what happens, what failed, and what people do about it (``somastack console``)."""
