"""`python -m dsconvert`."""

from dsconvert.cli import main

main()
