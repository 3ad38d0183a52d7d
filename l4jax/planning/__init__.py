"""What programs cost on hardware that is not present: they are compiled for it and never run."""
