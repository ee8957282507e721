"""What ``somastack doctor`` looks at."""
