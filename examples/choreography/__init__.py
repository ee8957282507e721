"""Three small services that react to each other's events: orders, stock and payment."""
