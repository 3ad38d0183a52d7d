"""What a program would cost on hardware that is not here: compiled for it, never run."""
