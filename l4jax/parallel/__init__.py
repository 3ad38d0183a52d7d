"""Arrays on devices: where weights go on a mesh, how a piece of a prompt is spread over its ranks, moving arrays to and from the host."""
