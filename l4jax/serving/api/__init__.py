"""The APIs: each translates its requests into the engine's, and what the engine says into its own answers."""
