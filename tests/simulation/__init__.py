"""A simulated cluster around real `Scheduler`s: virtual clock, unreliable links, mortal workers, one seed per history.

    world      the clock, and the network between vertices
    vertices   hubs, agents, executors: the machinery around each scheduler, faithful to what the real one promises
    workers    pools, and processes that run tasks and die
    checker    the invariants of the design, told by somebody who sees everything
    history    from a seed: a tree, a load, a series of misfortunes, and the recovery after which nothing may be left
    mutants    bugs planted by hand, to see that the checker would see them

A history is replayed exactly by its seed: `python -m tests.simulation --seeds 4711:4712 --verbose`.
"""
