"""A scenario: who takes part, with which data in which order, and how it is scored."""
