"""`python -m mixwright` is the command `mixwright`."""

from mixwright.cli import main

main()
