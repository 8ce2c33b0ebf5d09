"""Other libraries' attention as attnbench plugins: a module for each, so that what is not installed costs only its own.

A plugin whose library is missing is broken, with the import's error as its reason; the others run.
"""
