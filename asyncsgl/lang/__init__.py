"""The language: expressions, constraints, choices, media and chat templates."""
