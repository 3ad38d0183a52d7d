"""The engine: many requests share one compiled loop, one KV cache and one set of slots on the devices.

One half decides what is computed: ``scheduler``, with ``options``, ``rank`` (a data rank's slots and pages), ``pages`` (the page pool and
the prefix cache), ``sequence`` (a request under way) and ``step`` (what the runner is told, and what it returns). It is plain Python and
imports neither JAX nor numpy, so it is tested alone, and every host can repeat its decisions. The other modules compute:
``docs/architecture.md`` lists them. In short::

    scheduler = Scheduler(options)
    scheduler.add(Sequence(request, prompt, max_length))
    while not scheduler.idle:
        while (step := scheduler.next(most_steps)) is not None:
            in_flight.append((step, runner.dispatch(step, requests, masks)))
        step, dispatched = in_flight.popleft()
        results, outputs = dispatched.read()
        for news in scheduler.finish(step, results):
            ...  # news.tokens of news.sequence; scheduler.cancel(news.sequence) at a stop string
"""
