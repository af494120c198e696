"""Mutation testing of the modules that decide bits: ``python -m tests.mutation`` (see ``__main__``)."""
