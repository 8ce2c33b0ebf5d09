"""`python -m attnbench` is `attnbench`."""

from attnbench.commands import main

main()
