"""The published methods that a configuration may name: one frozen dataclass each, which checks its numbers, says what
it goes together with, and makes the method; one registry a kind."""
