"""The HTTP server: a front process without JAX, and the engine process, its child.

``front`` starts both and ends them; ``app`` has the routes; ``api`` translates the APIs' requests and answers; ``generation`` runs what
they ask for; ``engine_client`` speaks to the engine process, ``engine_process`` is that process, and ``messages`` is what they say.
"""
