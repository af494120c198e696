"""The commands of ``cufuse``, one a module: each has ``add(commands)``, which describes it, and runs from there."""
