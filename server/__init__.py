"""The server: relevance, aggregation, rounds and durable state. It holds no key and no model."""
