"""The HTTP server: a front process without JAX, and the engine process, its child.

``front`` listens and starts the engine process; ``app`` has the routes; ``api`` translates the APIs' requests and answers; ``generation``
computes the answers; ``engine_client`` speaks to the engine process, ``engine_process`` is it, and ``messages`` has what they exchange.
"""
