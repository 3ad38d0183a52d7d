"""The engine: many requests share one compiled loop, one KV cache and one set of slots on the devices.

The half that decides is plain Python and imports no JAX and no numpy, so it is tested alone, and every host replays it from
the same calls: ``pages`` hands out the cache's pages and finds prefixes, ``sequence`` is a request on its way, ``options`` says what there
is room for, ``rank`` is one data rank's slots and pages, ``step`` is what the runner is told and what it returns, and
``scheduler`` decides what the devices do next. The other half does it: ``engine``, ``runner``, ``results``, ``tables``, ``memory``,
``build`` and ``warmup``. In short::

    scheduler = Scheduler(options)
    scheduler.add(Sequence(request, prompt, max_length))
    while not scheduler.idle:
        while (step := scheduler.next(most_steps)) is not None:
            in_flight.append((step, runner.dispatch(step, requests)))
        step, dispatched = in_flight.popleft()
        results, outputs = dispatched.read()
        for news in scheduler.finish(step, results):
            ...  # news.tokens of news.sequence; scheduler.cancel(news.sequence) at a stop string
"""
