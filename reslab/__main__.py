"""`python -m reslab`, which is what torchrun starts."""

from reslab.cli import main

main()
