"""Log records as JSON lines for machines and as readable lines for people, without secrets and without surprises."""
